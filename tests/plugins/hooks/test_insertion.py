"""What the hook puts into a model, when, and who sees it."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import EMAHook, Hook
from mmengine.runner import Runner

from gplq.errors import StageError, TargetError
from gplq.plugins.hooks import ActivationQATHook, GPLQHook, WeightPTQHook
from gplq.record import named_quantizers, record_of

Train = Callable[..., Runner]


def scales(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if name.endswith('log_scale')}


def test_hooks_come_before_those_that_copy_the_model() -> None:
    assert all(
        Runner.register_hook and _priority(hook) < _priority(EMAHook)
        for hook in (ActivationQATHook, GPLQHook, WeightPTQHook)
    )


def _priority(hook: type[Hook]) -> int:
    from mmengine.runner import get_priority

    return get_priority(hook.priority)


class Average(Hook):
    """Keeps what EMAHook's copy holds when training ends, before anything is done with it."""

    priority = 'VERY_HIGH'

    def after_train(self, runner: Runner) -> None:
        (ema,) = [hook for hook in runner.hooks if isinstance(hook, EMAHook)]
        self.own = scales(runner.model)
        self.averaged = {n: t.clone() for n, t in ema.ema_model.module.state_dict().items()}
        self.tensors = (runner.model.state_dict(), ema.ema_model.module.state_dict())


def test_averages_have_quantizers_of_their_own_and_become_the_model(
    make_config: Callable[..., Config], steps_of: Callable
) -> None:
    config = make_config(stage=dict(scale_lr=0.05))
    config.custom_hooks = [dict(type='EMAHook', momentum=0.1, strict_load=True)]
    runner = Runner.from_cfg(config)
    watch = Average()
    runner.register_hook(watch)
    runner.train()

    student, average = watch.tensors
    assert set(average) == set(student)
    assert watch.own and all(average[name].data_ptr() != student[name].data_ptr() for name in watch.own)
    assert any(not torch.equal(watch.averaged[name], own) for name, own in watch.own.items())
    # What was averaged is what is kept and quantized; scales of products are not folded into anything.
    steps = steps_of(runner)
    kept = torch.load(steps[1]['checkpoint'], weights_only=True)['state_dict']
    assert all(torch.equal(kept[name], watch.averaged[name]) for name in watch.own)
    final = torch.load(steps[2]['checkpoint'], weights_only=True)['state_dict']
    products = [name for name in watch.own if 'quantized_products' in name]
    assert len(products) == 8
    for name in products:
        assert torch.equal(final[name], watch.averaged[name])
        assert torch.equal(runner.model.state_dict()[name], watch.averaged[name])

    test = make_config('test')
    test.load_from = steps[2]['checkpoint']
    assert Runner.from_cfg(test).test() == pytest.approx(steps[2]['metrics'])


def test_an_average_that_would_be_made_before_the_quantizers_is_refused(make_config: Callable[..., Config]) -> None:
    config = make_config()
    config.custom_hooks = [dict(type='EMAHook', priority='HIGH')]
    with pytest.raises(StageError, match="EMAHook has the priority HIGH .* set priority='NORMAL' for it"):
        Runner.from_cfg(config).train()


@pytest.mark.parametrize('how', ['test', 'val'])
def test_checkpoints_of_an_averaged_run_are_measured_with_its_config(
    how: str, make_config: Callable[..., Config], train: Train, steps_of: Callable
) -> None:
    def average(config: Config) -> None:
        config.custom_hooks = [dict(type='EMAHook', momentum=0.1)]

    trained = train('run', average, stage=dict(scale_lr=0.05))
    steps = steps_of(trained)
    # The epoch ends with the training here, and its checkpoint holds the average that W32A4 measures.
    expected = {step['checkpoint']: step['metrics'] for step in steps[1:]}
    expected[str(Path(trained.work_dir) / 'epoch_1.pth')] = steps[1]['metrics']
    for path, metrics in expected.items():
        config = make_config('again')
        average(config)
        config.load_from = path
        assert getattr(Runner.from_cfg(config), how)() == pytest.approx(metrics), path


def test_teacher_is_the_fp32_part(train: Train, checkpoint: Path) -> None:
    runner = train()
    kept = torch.load(Path(runner.work_dir) / 'gplq_teacher.pth', weights_only=True)['state_dict']
    original = torch.load(checkpoint, weights_only=True)['state_dict']
    own = {name.removeprefix('backbone.'): t for name, t in original.items() if name.startswith('backbone.')}
    assert own.keys() <= kept.keys()
    assert all(torch.equal(kept[name], tensor) for name, tensor in own.items())
    assert any(not torch.equal(runner.model.backbone.state_dict()[name], tensor) for name, tensor in own.items())


def losses(log: str) -> list[dict[str, float]]:
    lines = re.findall(r'Iter\(train\) \[.*', log)
    return [{name: float(value) for name, value in re.findall(r'(loss\w*): ([\d.]+)', line)} for line in lines]


def test_mimicking_is_part_of_the_loss(train: Train, log_of: Callable[[Runner], str]) -> None:
    found = losses(log_of(train()))
    assert len(found) == 4
    for line in found:
        assert line['loss_mimicking'] > 0
        assert line['loss'] == pytest.approx(line['loss_cls'] + line['loss_mimicking'], abs=2e-4)


def test_mimicking_weight_scales_its_loss(train: Train, log_of: Callable[[Runner], str]) -> None:
    # The first loss is that of the calibrated model, which does not depend on the weight. The log rounds
    # it to four decimals, so that the lighter of the two is known to half of that, times the ratio.
    light, heavy = (losses(log_of(train(str(w), mimicking=w, iterations=1)))[0] for w in (20.0, 200.0))
    assert light['loss_mimicking'] > 0.01
    assert heavy['loss_mimicking'] == pytest.approx(10 * light['loss_mimicking'], abs=11 * 0.5e-4)


def test_mimicking_can_be_switched_off(train: Train, log_of: Callable[[Runner], str]) -> None:
    runner = train(mimicking=False)
    assert [set(line) for line in losses(log_of(runner))] == [{'loss', 'loss_cls'}] * 4
    assert not (Path(runner.work_dir) / 'gplq_teacher.pth').exists()


def test_without_labels_heads_neither_run_nor_move(
    make_config: Callable[..., Config], log_of: Callable[[Runner], str], checkpoint: Path, toy: ModuleType
) -> None:
    runner = Runner.from_cfg(make_config(label_free=True, stage=dict(lr=1e-3)))
    calls = []
    runner.model.head.register_forward_hook(lambda module, *_: calls.append(module.training))
    runner.train()
    assert not any(calls), 'the head ran in training mode'
    assert calls, 'validation runs it'
    assert [set(line) for line in losses(log_of(runner))] == [{'loss', 'loss_mimicking'}] * 4
    original = torch.load(checkpoint, weights_only=True)['state_dict']
    for name in original:
        if not name.startswith('backbone.'):
            assert torch.equal(runner.model.state_dict()[name], original[name]), name
    moved = torch.load(Path(runner.work_dir) / 'gplq_w32a4.pth', weights_only=True)['state_dict']
    assert not torch.equal(moved['backbone.norm.weight'], original['backbone.norm.weight'])
    assert type(runner.model.loss(torch.zeros(1, 3, 16, 16), [torch.tensor(0)])['loss_cls']) is torch.Tensor


def test_a_copy_of_the_model_in_training_has_its_own_scales(
    make_config: Callable[..., Config], toy: ModuleType
) -> None:
    class Copy(Hook):
        def after_train_epoch(self, runner: Runner) -> None:
            self.copy = copy.deepcopy(runner.model).eval()
            self.before = self.copy.logits(images)

    images = toy.ToyImages(length=4, seed=3).images
    runner = Runner.from_cfg(make_config())
    watch = Copy()
    runner.register_hook(watch)
    runner.train()
    with torch.no_grad():
        for _, quantizer in named_quantizers(runner.model):
            quantizer.log_scale.add_(1.0)
        torch.testing.assert_close(watch.copy.logits(images), watch.before)


def test_activation_checkpointing_leaves_the_teacher_alone(train: Train, log_of: Callable[[Runner], str]) -> None:
    def change(config: Config) -> None:
        config.activation_checkpointing = ['backbone.blocks.0', 'backbone.blocks.1']

    plain, checkpointed = train('plain'), train('checkpointed', change=change)
    assert losses(log_of(checkpointed)) == losses(log_of(plain))


def test_a_compiled_step_learns_alike(train: Train, log_of: Callable[[Runner], str]) -> None:
    def change(config: Config) -> None:
        config.compile = dict(backend='aot_eager')

    plain, compiled = train('plain'), train('compiled', change=change)
    assert losses(log_of(compiled)) == losses(log_of(plain))


def test_targets_reach_beyond_the_backbone(train: Train) -> None:
    runner = train(targets=['backbone', 'head'])
    names = {plan.name for plan in record_of(runner.model).plan.maps}
    assert 'head' in names and len(names) == 10


def test_another_part(train: Train) -> None:
    runner = train(part='backbone', targets='backbone.blocks.0*')
    assert {plan.name.split('.')[2] for plan in record_of(runner.model).plan.maps} == {'0'}


LEAN = """
import sys
from mmengine.registry import HOOKS, MODELS, root
import gplq.plugins.hooks
assert HOOKS.get('GPLQHook') is gplq.plugins.hooks.GPLQHook
mm = sorted(m for m in sys.modules if m.split('.')[0] in ('mmdet', 'mmcv', 'timm', 'torchvision'))
assert not mm, mm
ours = [n for n, c in MODELS.module_dict.items() if c.__module__.startswith('gplq')]
assert not ours, ours
"""


def test_importing_the_hooks_imports_neither_detector_nor_operators() -> None:
    done = subprocess.run([sys.executable, '-c', LEAN], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_full_path_needs_no_import_line(tmp_path: Path, make_config: Callable[..., Config]) -> None:
    elsewhere = tmp_path / 'somewhere/else'
    elsewhere.mkdir(parents=True)
    config = make_config()
    hooks = config.pop('default_hooks')
    Config(dict(default_hooks=dict(logger=hooks.logger), **{k: config[k] for k in config})).dump(
        str(elsewhere / 'base.py')
    )
    user = elsewhere / 'user.py'
    user.write_text(
        "_base_ = './base.py'\n"
        f'default_hooks = dict(gplq={dict(hooks.gplq, iterations=1)!r})\n'
        f'load_from = {str(config.load_from)!r}\n'
    )
    runner = Runner.from_cfg(Config.fromfile(user))
    runner.train()
    assert any(type(hook) is GPLQHook for hook in runner.hooks)
    assert (Path(runner.work_dir) / 'gplq_w4a4.safetensors').is_file()


def test_unknown_settings_are_refused(make_config: Callable[..., Config]) -> None:
    from gplq.errors import RecipeError

    cases: list[tuple[dict[str, Any], str]] = [
        (dict(weight_bit=4), "the hook has no setting .'weight_bit'.; did you mean .'weight_bits'."),
        (dict(recipe=dict(bits=4)), "recipe has no setting .'bits'."),
        (dict(stage=dict(learning_rate=1)), "stage has no setting .'learning_rate'."),
        (dict(method='magic'), "method must be .*'magic'"),
        (dict(iterations=-1), 'iterations=-1'),
        (dict(label_free=True, mimicking=False), 'label_free=True'),
    ]
    for arguments, message in cases:
        with pytest.raises(RecipeError, match=message):
            Runner.from_cfg(make_config(**arguments))


def test_activation_checkpointing_changes_no_compensation(train: Train) -> None:
    def change(config: Config) -> None:
        config.activation_checkpointing = ['backbone.blocks.0', 'backbone.blocks.1']

    plain, checkpointed, none = (
        train(name, change=edit, recipe=dict(compensation=kind))
        for name, edit, kind in (('plain', None, 'affine'), ('checkpointed', change, 'affine'), ('none', None, 'none'))
    )
    state = plain.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in checkpointed.model.state_dict().items())
    assert any(not torch.equal(tensor, state[name]) for name, tensor in none.model.state_dict().items())


@pytest.mark.parametrize('label_free', [False, True])
def test_what_the_model_froze_stays_as_it_is(
    make_config: Callable[..., Config], checkpoint: Path, label_free: bool
) -> None:
    runner = Runner.from_cfg(make_config(label_free=label_free, stage=dict(lr=1e-2)))
    runner.model.backbone.patch_embed.requires_grad_(False)
    runner.train()
    original = torch.load(checkpoint, weights_only=True)['state_dict']
    trained = torch.load(Path(runner.work_dir) / 'gplq_w32a4.pth', weights_only=True)['state_dict']
    same = {name for name in original if torch.equal(original[name], trained[name])}
    assert 'backbone.patch_embed.weight' in same
    assert 'backbone.blocks.1.fc1.weight' not in same


def test_the_part_may_lie_deeper(make_config: Callable[..., Config], toy: ModuleType, tmp_path: Path) -> None:
    class Wrapper(toy.BaseModel):
        def __init__(self) -> None:
            super().__init__(data_preprocessor=toy.ImgDataPreprocessor())
            self.student = toy.ToyClassifier()

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.student(*args, **kwargs)

    model = Wrapper()
    torch.save({'state_dict': model.state_dict()}, tmp_path / 'wrapper.pth')
    config = make_config(part='student.backbone', recipe=dict(compensation='ridge'))
    config.model, config.load_from = model, str(tmp_path / 'wrapper.pth')
    runner = Runner.from_cfg(config)
    runner.train()
    assert {plan.name.split('.')[1] for plan in record_of(runner.model).plan.maps} == {'backbone'}
    with pytest.raises(TargetError, match=r"part='student\.neck2': Wrapper has \['data_preprocessor', 'student'\]"):
        Runner.from_cfg({**config, 'experiment_name': 'deep', 'default_hooks': two_lines('student.neck2')}).train()


def two_lines(part: str) -> dict[str, Any]:
    return dict(gplq=dict(type='gplq.plugins.GPLQHook', part=part))


def test_a_hook_that_pairs_parameters_is_refused(make_config: Callable[..., Config]) -> None:
    class MeanTeacherHook(Hook):
        pass

    runner = Runner.from_cfg(make_config())
    runner.register_hook(MeanTeacherHook())
    with pytest.raises(StageError, match='MeanTeacherHook pairs the parameters'):
        runner.train()
