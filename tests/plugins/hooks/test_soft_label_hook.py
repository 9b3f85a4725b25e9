"""A teacher's soft labels, computed as batches come."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner
from torch import Tensor, nn

from gplq.errors import CheckpointError, RecipeError, TargetError
from gplq.plugins import SoftLabelHook
from gplq.plugins.fgvc import TimmClassifier


def running(model: nn.Module) -> Any:
    """A Runner that trains."""
    return SimpleNamespace(model=model, _train_loop=object())


TINY = dict(img_size=16, patch_size=4, depth=1, embed_dim=12, num_heads=3)
MODEL = dict(type='gplq.plugins.fgvc.TimmClassifier', model_name='vit_tiny_patch16_224', model_args=TINY)


@pytest.fixture
def teach(tmp_path: Path) -> Callable[..., SoftLabelHook]:
    """A hook with a teacher of so many classes, before the training of a model."""

    def make(model: nn.Module, classes: int = 3, **config: Any) -> SoftLabelHook:
        torch.manual_seed(1)
        teacher = TimmClassifier('vit_tiny_patch16_224', classes, model_args=TINY)
        torch.save({'state_dict': teacher.state_dict()}, tmp_path / 'teacher.pth')
        Config(dict(model=dict(MODEL, num_classes=classes))).dump(tmp_path / 'teacher.py')
        hook = SoftLabelHook(str(tmp_path / 'teacher.py'), str(tmp_path / 'teacher.pth'), **config)
        hook.before_run(running(model))
        hook.before_train(running(model))
        return hook

    return make


def chances(path: Path, images: Tensor, temperature: float = 1.0) -> Tensor:
    teacher = TimmClassifier('vit_tiny_patch16_224', 3, model_args=TINY).eval()
    teacher.load_state_dict(torch.load(path, weights_only=True)['state_dict'])
    with torch.no_grad():
        return (teacher.logits(images) / temperature).softmax(-1)


def test_the_loss_is_of_the_teachers_chances(teach: Callable[..., SoftLabelHook], tmp_path: Path) -> None:
    model = TimmClassifier('vit_tiny_patch16_224', 3, model_args=TINY, label_smoothing=0.1)
    images = torch.randn(2, 3, 16, 16)
    for temperature in (1.0, 4.0):
        batch: dict[str, Any] = {'inputs': list(images), 'labels': [0, 2]}
        hook = teach(model, temperature=temperature)
        hook.before_train_iter(running(model), 0, batch)
        soft = chances(tmp_path / 'teacher.pth', images, temperature)
        assert torch.allclose(torch.stack(batch['soft_labels']), soft, atol=1e-6)
        loss = model(**model.data_preprocessor(batch, True), mode='loss')['loss_cls']
        assert float(loss) == pytest.approx(float(-(soft * model.logits(images).log_softmax(-1)).sum(-1).mean()))


def test_samples_of_mmpretrain_take_a_score(teach: Callable[..., SoftLabelHook], tmp_path: Path) -> None:
    class Sample:
        def set_gt_score(self, score: Tensor) -> None:
            self.score = score

    class Preprocessor(nn.Module):
        def forward(self, data: dict[str, Any], training: bool) -> dict[str, Any]:
            return {**data, 'inputs': torch.stack(data['inputs'])}

    model = nn.Module()
    model.head, model.data_preprocessor = nn.Linear(2, 3), Preprocessor()
    images, samples = torch.randn(2, 3, 16, 16), [Sample(), Sample()]
    hook = teach(model)
    hook.before_train_iter(running(model), 0, {'inputs': list(images), 'data_samples': samples})
    found = torch.stack([sample.score for sample in samples])
    assert torch.allclose(found, chances(tmp_path / 'teacher.pth', images), atol=1e-6)


def test_a_run_is_taught(train: Callable[..., Runner], toy: Any, checkpoint: Path, tmp_path: Path) -> None:
    """Labels decide nothing any more: a run on other labels comes to the same weights."""
    (tmp_path / 'toy_teacher.py').write_text("model = dict(type='SoftToy')\n")

    class SoftToy(toy.ToyClassifier):
        def forward(
            self, inputs: Tensor, labels: Any = None, mode: str = 'tensor', soft_labels: Any = None, **about: Any
        ) -> Any:
            if mode != 'loss':
                return super().forward(inputs, labels, mode)
            return {'loss_cls': torch.nn.functional.cross_entropy(self.logits(inputs), torch.stack(soft_labels))}

    toy.MODELS.register_module(name='SoftToy', module=SoftToy, force=True)
    weights = []
    for number in range(2):

        def change(config: Config, number: int = number) -> None:
            config.model = dict(type='SoftToy')
            teaching = dict(config=str(tmp_path / 'toy_teacher.py'), checkpoint=str(checkpoint))
            config.custom_hooks = [dict(type='gplq.plugins.SoftLabelHook', **teaching)]
            if number:
                config.train_dataloader.collate_fn = dict(type='wrong_labels')

        runner = train(f'run{number}', change=change, mimicking=0, validate_fp32=False)
        assert not runner.message_hub.log_scalars.get('train/loss_mimicking')
        weights.append(runner.model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.fixture(autouse=True)
def wrong_labels() -> None:
    from mmengine.dataset import pseudo_collate
    from mmengine.registry import FUNCTIONS

    def collate(samples: list[dict[str, Any]]) -> Any:
        return pseudo_collate([{**sample, 'labels': torch.tensor(0)} for sample in samples])

    FUNCTIONS.register_module(name='wrong_labels', module=collate, force=True)


def test_a_finished_student_needs_no_teacher(teach: Callable[..., SoftLabelHook]) -> None:
    SoftLabelHook('gone.py', 'gone.pth').before_run(SimpleNamespace(_train_loop=None))  # type: ignore[arg-type]


def test_what_cannot_teach_is_refused(teach: Callable[..., SoftLabelHook], tmp_path: Path) -> None:
    model = TimmClassifier('vit_tiny_patch16_224', 3, model_args=TINY)
    with pytest.raises(RecipeError, match='temperature=0 must be above 0'):
        SoftLabelHook('a.py', 'a.pth', temperature=0)
    with pytest.raises(TargetError, match=r'the model \(Linear\) is no classifier with a head'):
        teach(nn.Linear(2, 3))
    hook = teach(model, classes=4)
    with pytest.raises(TargetError, match='the teacher has 4 classes, the model 3'):
        hook.before_train_iter(running(model), 0, {'inputs': [torch.zeros(3, 16, 16)], 'labels': [0]})
    hook = teach(model)
    with pytest.raises(TargetError, match=r'the batch holds \(2, 12\), no images .* leave out FeatureCacheHook'):
        hook.before_train_iter(running(model), 0, {'inputs': [torch.zeros(12)] * 2, 'labels': [0, 1]})
    with pytest.raises(TargetError, match='the teacher gives NaN or infinite logits; check .*teacher.pth'):
        hook.before_train_iter(running(model), 0, {'inputs': [torch.full((3, 16, 16), torch.nan)], 'labels': [0]})
    missing = SoftLabelHook(str(tmp_path / 'teacher.py'), str(tmp_path / 'nowhere.pth'))
    with pytest.raises(CheckpointError, match='nowhere.pth does not exist'):
        missing.before_run(running(model))
