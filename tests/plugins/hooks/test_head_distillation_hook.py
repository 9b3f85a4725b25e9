"""What a teacher's heads say as a second aim, in a Runner."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from mmengine.runner import Runner
from torch import Tensor, nn

from gplq.errors import CheckpointError, RecipeError, TargetError
from gplq.plugins import HeadDistillationHook

LOSS = 'train/loss_heads'


@pytest.fixture
def train_with(detector: Callable[..., Runner], tiny_detector_config: Path) -> Callable[..., Runner]:
    """Four-bit training of the tiny detector, or its FP32 control, taught by the checkpoint given."""

    def run(checkpoint: Path, name: str, bits: int = 32, **hook: Any) -> Runner:
        teaching = dict(
            type='gplq.plugins.HeadDistillationHook', config=str(tiny_detector_config), checkpoint=str(checkpoint)
        )

        def change(cfg: Config) -> None:
            cfg.custom_hooks = [{**teaching, **hook}]

        stage = dict(lr=1e-4)
        runner = detector(
            name,
            change=change,
            weight_bits=bits,
            activation_bits=bits,
            mimicking=0,
            iterations=2,
            stage=stage,
            validate_fp32=False,
        )
        runner.train()
        return runner

    return run


def losses_of(runner: Runner) -> list[float]:
    return [float(value) for value in runner.message_hub.log_scalars[LOSS].data[0]]


def test_a_copy_of_the_student_teaches_nothing_at_first(train_with: Callable[..., Runner], tmp_path: Path) -> None:
    alike = losses_of(train_with(tmp_path / 'fp32.pth', 'alike'))
    assert len(alike) == 2
    # The student is in training mode, but this one has neither dropout nor batch statistics.
    assert alike[0] == pytest.approx(0, abs=1e-6)
    assert alike[1] > 1e-6


def test_each_head_counts(train_with: Callable[..., Runner], tmp_path: Path) -> None:
    state = torch.load(tmp_path / 'fp32.pth', weights_only=True)['state_dict']
    last = ('rpn_head.rpn_cls', 'bbox_head.fc_reg', 'mask_head.conv_logits')
    for number, name in enumerate(last):
        changed = {key: value * 2 if f'{name}.weight' in key else value for key, value in state.items()}
        torch.save({'state_dict': changed}, tmp_path / 'other.pth')
        runner = train_with(tmp_path / 'other.pth', f'other{number}')
        assert losses_of(runner)[0] > 0.01, name
    half = losses_of(train_with(tmp_path / 'other.pth', 'half', weight=0.5))
    assert half[0] == pytest.approx(losses_of(runner)[0] / 2, rel=1e-4)


def test_a_quantized_student_learns_and_is_left_clean(train_with: Callable[..., Runner], tmp_path: Path) -> None:
    before = (tmp_path / 'fp32.pth').read_bytes()
    runner = train_with(tmp_path / 'fp32.pth', 'w4a4', bits=4)
    assert losses_of(runner)[0] > 1e-4
    assert (tmp_path / 'fp32.pth').read_bytes() == before
    saved = torch.load(tmp_path / 'w4a4' / 'gplq_w4a4.pth', weights_only=True)['state_dict']
    assert not any('teacher' in name for name in saved)
    model = runner.model
    assert not any(module._forward_hooks for module in (model, model.rpn_head, model.roi_head.bbox_head))


class Cut(nn.Module):
    def forward(self, maps: list[Tensor], rois: Tensor) -> Tensor:
        return maps[0][rois.long(), :, :2, :2]


class BoxHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.fc(x.flatten(1))
        return y[:, :2], y[:, 2:]


@MODELS.register_module()
class TinyCascade(nn.Module):
    """Two stages that see the first map of two; no dense head."""

    def __init__(self, stages: int = 2, queries: bool = False) -> None:
        super().__init__()
        self.neck = nn.Conv2d(3, 3, 1)
        self.roi_head = nn.Module()
        self.roi_head.bbox_roi_extractor = nn.ModuleList(Cut() for _ in range(stages))
        self.roi_head.bbox_head = nn.ModuleList(BoxHead() for _ in range(stages))
        self.queries = queries

    def extract_feat(self, images: Tensor) -> tuple[Tensor, Tensor]:
        first = self.neck(images)
        return first, first[..., ::2, ::2]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = self.extract_feat(images)
        rois = torch.arange(len(images))
        total = images.new_zeros(())
        for cut, head in zip(self.roi_head.bbox_roi_extractor, self.roi_head.bbox_head, strict=True):
            scores, boxes = head(cut((images,) * 3 if self.queries else maps[:1], rois))
            total = total + scores.square().mean() + boxes.square().mean()
        return {'loss': total}


def attached(tmp_path: Path, student: nn.Module, teacher: nn.Module, **config: Any) -> HeadDistillationHook:
    (tmp_path / 'cascade.py').write_text(f'model = {dict(type="TinyCascade", **config)}\n')
    torch.save({'state_dict': teacher.state_dict()}, tmp_path / 'cascade.pth')
    hook = HeadDistillationHook(str(tmp_path / 'cascade.py'), str(tmp_path / 'cascade.pth'))
    runner: Any = SimpleNamespace(model=student, _train_loop=object())
    hook.before_run(runner)
    hook.before_train(runner)
    return hook


def test_every_stage_of_a_cascade_by_hand(tmp_path: Path) -> None:
    torch.manual_seed(0)
    student, teacher, images = TinyCascade(), TinyCascade(), torch.randn(4, 3, 4, 4)
    hook = attached(tmp_path, student, teacher)
    found = student(images)['loss_heads']
    watched = (student.roi_head.bbox_head[0], student.roi_head.bbox_roi_extractor[1])
    taps = [hook.__self__ for module in watched for hook in module._forward_hooks.values()]
    assert len(taps) == 2 and all(not tap.features and tap.arguments == ((), {}) for tap in taps), 'graphs are let go'
    expected = []
    for number in range(2):
        ours, theirs = (
            m.roi_head.bbox_head[number](m.extract_feat(images)[0][:, :, :2, :2]) for m in (student, teacher)
        )
        of_stage = [
            (a - b).square().mean() / (b - b.mean(0)).square().mean() for a, b in zip(ours, theirs, strict=True)
        ]
        expected.append(torch.stack(of_stage).mean())
    assert float(found) == pytest.approx(float(torch.stack(expected).mean()), rel=1e-5)
    found.backward()
    assert student.neck.weight.grad is not None and bool(student.neck.weight.grad.any())
    hook.after_train(SimpleNamespace())  # type: ignore[arg-type]
    assert set(student(images)) == {'loss'}


def test_a_finished_student_needs_no_teacher() -> None:
    HeadDistillationHook('gone.py', 'gone.pth').before_run(SimpleNamespace(_train_loop=None))  # type: ignore[arg-type]


def test_what_cannot_teach_is_refused(train_with: Callable[..., Runner], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match='weight=0 must be above 0'):
        HeadDistillationHook('a.py', 'a.pth', weight=0)
    with pytest.raises(RecipeError, match='config nowhere.py does not exist'):
        train_with(tmp_path / 'fp32.pth', 'run', config='nowhere.py')
    with pytest.raises(CheckpointError, match='nowhere.pth does not exist'):
        train_with(tmp_path / 'nowhere.pth', 'run')
    with pytest.raises(TargetError, match=r"heads \['roi_head.bbox_head.0', .*the teacher \['roi_head.bbox_head.0'\]"):
        attached(tmp_path, TinyCascade(), TinyCascade(1), stages=1)
    student = TinyCascade(queries=True)
    attached(tmp_path, student, TinyCascade())
    with pytest.raises(TargetError, match=r'roi_head.bbox_head.0 \(BoxHead\) is not called with the feature maps'):
        student(torch.randn(4, 3, 4, 4))
