"""Going on after an interruption."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner

from gplq.errors import CheckpointError, StageError
from gplq.plugins.results import ResultError
from gplq.record import Stage, record_of


class Killed(Exception):
    pass


class Kill(Hook):
    """Ends the run in its second epoch."""

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: object = None) -> None:
        if runner.iter == 10:
            raise Killed


@pytest.fixture
def killed(make_config: Callable[..., Config]) -> Runner:
    """A run of two epochs that was killed in the second; the first one's checkpoint is there."""
    runner = Runner.from_cfg(make_config(iterations=16))
    runner.register_hook(Kill())
    with pytest.raises(Killed):
        runner.train()
    return runner


def resumed(make_config: Callable[..., Config], load_from: str | None = None, **hook: object) -> Runner:
    config = make_config(**{'iterations': 16, **hook})
    config.resume, config.load_from = True, load_from
    return Runner.from_cfg(config)


def test_resume_goes_on_from_the_last_epoch(
    killed: Runner, make_config: Callable[..., Config], steps_of: Callable, checkpoint: Path
) -> None:
    before = torch.load(Path(killed.work_dir) / 'epoch_1.pth', weights_only=True)
    fp32 = steps_of(killed)
    runner = resumed(make_config)
    seen = []

    class Watch(Hook):
        def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: object = None) -> None:
            if not seen:
                state = runner.model.state_dict()
                assert all(torch.equal(state[name], tensor) for name, tensor in before['state_dict'].items())
                assert record_of(runner.model).stage is Stage.CALIBRATED
                steps = {float(s['step']) for s in runner.optim_wrapper.optimizer.state.values()}
                assert steps == {8.0}, 'the moments of the optimizer go on too'
            seen.append(runner.iter)

    runner.register_hook(Watch())
    runner.train()
    assert seen == list(range(8, 16))
    assert [s['step'] for s in steps_of(runner)] == ['FP32', 'W32A4', 'W4A4']
    assert steps_of(runner)[0] == fp32[0], 'what was measured before the interruption stays'
    # The teacher is that of the first run, not the half-trained model.
    original = torch.load(checkpoint, weights_only=True)['state_dict']
    teacher = torch.load(Path(runner.work_dir) / 'gplq_teacher.pth', weights_only=True)['state_dict']
    assert torch.equal(teacher['norm.weight'], original['backbone.norm.weight'])


def test_teacher_after_resume_computes_what_it_did(killed: Runner, make_config: Callable[..., Config]) -> None:
    from gplq.plugins.hooks.teacher import resume_mimicking, teacher_hash

    runner = resumed(make_config)
    losses: list[float] = []

    class Compare(Hook):
        def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None) -> None:
            settings = next(h for h in runner.hooks if hasattr(h, 'activation_stage')).activation_stage.settings
            mimicking = resume_mimicking(runner, settings, teacher_hash(runner))
            images = torch.stack(data_batch['inputs'])
            with torch.no_grad(), mimicking.attached():
                runner.model.backbone.eval()
                mimicking.teacher(images)
                plain = fp32.backbone.eval()(images)[0]
                torch.testing.assert_close(mimicking.teacher(images)[0], plain)
            losses.append(1.0)
            raise Killed

    import sys

    fp32 = sys.modules['toy'].ToyClassifier()
    fp32.load_state_dict(torch.load(str(make_config().load_from), weights_only=True)['state_dict'])
    runner.register_hook(Compare())
    with pytest.raises(Killed):
        runner.train()
    assert losses


def test_another_recipe_is_refused(killed: Runner, make_config: Callable[..., Config]) -> None:
    with pytest.raises(CheckpointError, match='another recipe .*activation_bits: 4 there, 3 here'):
        resumed(make_config, activation_bits=3).train()
    # What only the weight stage decides is no reason to refuse it a checkpoint, but one not to call this going on.
    with pytest.raises(CheckpointError, match='set up differently .weight_bits: 4 there, 3 here.*start anew'):
        resumed(make_config, weight_bits=3).train()


def test_lost_teacher_is_an_error(killed: Runner, make_config: Callable[..., Config]) -> None:
    (Path(killed.work_dir) / 'gplq_teacher.pth').unlink()
    with pytest.raises(CheckpointError, match=r'gplq_teacher.pth is missing.*start anew'):
        resumed(make_config).train()


@pytest.mark.parametrize(
    ('name', 'content', 'told'),
    [
        ('gplq.json', '[{"step": "FP', 'is no JSON.*delete it to resume without'),
        ('gplq.json', '{}', r"is no list of objects with \['metrics', 'minutes', 'step'\]; delete it"),
        ('gplq_curve.json', '[{"iteration": 8}]', "is no list of objects with .*'minutes'.*delete it"),
    ],
)
def test_damaged_notes_are_an_error(
    name: str, content: str, told: str, killed: Runner, make_config: Callable[..., Config]
) -> None:
    (Path(killed.work_dir) / name).write_text(content)
    with pytest.raises(ResultError, match=f'{name} {told}'):
        resumed(make_config).train()


def test_nothing_to_resume_is_an_error(make_config: Callable[..., Config]) -> None:
    with pytest.raises(CheckpointError, match='no checkpoint to resume in .*: start without --resume'):
        resumed(make_config).train()


def test_only_checkpoints_of_this_stage_are_resumed(
    train: Callable[..., Runner], make_config: Callable[..., Config], checkpoint: Path
) -> None:
    runner = train()
    with pytest.raises((CheckpointError, StageError), match='quantized already'):
        resumed(make_config, str(Path(runner.work_dir) / 'gplq_w4a4.pth')).train()
    with pytest.raises(CheckpointError, match='not written by a run with this hook'):
        resumed(make_config, str(checkpoint)).train()
