"""A teacher's features as a second aim, in a Runner."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner

from gplq.errors import CheckpointError, RecipeError, TargetError
from gplq.plugins import FeatureDistillationHook


def losses_of(runner: Runner) -> list[float]:
    return [value for value, _ in _scalars(runner)['train/loss_distillation']]


def _scalars(runner: Runner) -> dict[str, list[tuple[float, int]]]:
    return {name: [(float(v), 0) for v in buffer.data[0]] for name, buffer in runner.message_hub.log_scalars.items()}


@pytest.fixture
def train_with(detector: Callable[..., Runner], tiny_detector_config: Path) -> Callable[..., Runner]:
    """An FP32 control of the tiny detector, taught by the checkpoint given."""

    def run(checkpoint: Path, name: str = 'run', more: tuple[dict[str, Any], ...] = (), **hook: Any) -> Runner:
        teaching = dict(
            type='gplq.plugins.FeatureDistillationHook', config=str(tiny_detector_config), checkpoint=str(checkpoint)
        )

        def change(cfg: Config) -> None:
            cfg.custom_hooks = [{**teaching, **hook}, *more]

        runner = detector(
            name,
            change=change,
            weight_bits=32,
            activation_bits=32,
            mimicking=0,
            iterations=3,
            stage=dict(lr=1e-4),
            validate_fp32=False,
        )
        runner.train()
        return runner

    return run


@pytest.fixture
def other(detector: Callable[..., Runner], tmp_path: Path) -> Path:
    """Another model's weights: the detector's own with a neck of twice the size."""
    state = torch.load(tmp_path / 'fp32.pth', weights_only=True)['state_dict']
    path = tmp_path / 'other.pth'
    torch.save({'state_dict': {k: v * 2 if k.startswith('neck') else v for k, v in state.items()}}, path)
    return path


def test_a_copy_of_the_student_teaches_nothing_at_first(
    train_with: Callable[..., Runner], other: Path, tmp_path: Path
) -> None:
    alike = losses_of(train_with(tmp_path / 'fp32.pth', 'alike'))
    assert len(alike) == 3
    # The student is in training mode, but this one has neither dropout nor batch statistics.
    assert alike[0] == pytest.approx(0, abs=1e-4)
    assert alike[1] > 0
    different = losses_of(train_with(other, 'different'))
    assert different[0] > 0.1
    half = losses_of(train_with(other, 'half', weight=2.0))
    assert half[0] == pytest.approx(different[0] / 2, rel=1e-4)


def test_the_student_comes_nearer_and_the_teacher_stays_as_it_is(
    train_with: Callable[..., Runner], other: Path, tmp_path: Path
) -> None:
    before = other.read_bytes()
    runner = train_with(other, weight=400.0)
    assert other.read_bytes() == before
    saved = torch.load(tmp_path / 'run' / 'gplq_fp32_control.pth', weights_only=True)['state_dict']
    # The teacher's maps are twice the student's: the norms behind them grow, by AdamW's rate a step.
    sizes = {
        name: tensor for name, tensor in saved.items() if 'fpn_convs' in name and tensor.dim() == 1 and 'w' in name
    }
    assert len(sizes) == 4
    for name, size in sizes.items():
        assert (size.mean() - 1).item() == pytest.approx(3e-4, rel=0.2), name
    assert set(saved) == set(torch.load(other, weights_only=True)['state_dict']), 'the teacher is no part of the model'
    assert not runner.model._forward_hooks and not runner.model.neck._forward_hooks


def test_an_average_is_taken_of_the_student_alone(train_with: Callable[..., Runner], other: Path) -> None:
    runner = train_with(other, more=(dict(type='EMAHook', momentum=0.5),))
    assert len(losses_of(runner)) == 3


def test_what_cannot_teach_is_refused_before_training(
    train_with: Callable[..., Runner], other: Path, tmp_path: Path, tiny_detector_config: Path
) -> None:
    with pytest.raises(RecipeError, match='weight=0 must be above 0'):
        FeatureDistillationHook('a.py', 'a.pth', weight=0)
    with pytest.raises(RecipeError, match='config nowhere.py does not exist'):
        train_with(other, config='nowhere.py')
    with pytest.raises(CheckpointError, match='nowhere.pth does not exist'):
        train_with(tmp_path / 'nowhere.pth')
    state = torch.load(other, weights_only=True)['state_dict']
    torch.save({'state_dict': dict(list(state.items())[:5])}, tmp_path / 'part.pth')
    with pytest.raises(CheckpointError, match=r'part.pth is not a checkpoint of .*tiny.py: Missing key'):
        train_with(tmp_path / 'part.pth')
    wide = tmp_path / 'wide.py'
    wide.write_text(tiny_detector_config.read_text() + "\nmodel.setdefault('neck', {}).update(num_outs=5)\n")
    with pytest.raises(TargetError, match='the student gives maps of'):
        train_with(other, config=str(wide))
