"""Quantized checkpoints under a config without the two lines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner

from gplq.errors import CheckpointError
from gplq.plugins.hooks.restore_hook import RestoreHook
from gplq.record import is_prepared


@pytest.fixture
def measure(make_config: Callable[..., Config]) -> Callable[..., tuple[Runner, dict[str, float]]]:
    """Tests a checkpoint, by default under the FP32 model's config."""

    def run(path: str, hook: bool = False) -> tuple[Runner, dict[str, float]]:
        config = make_config('test')
        config.load_from = path
        if not hook:
            config.default_hooks.pop('gplq')
        runner = Runner.from_cfg(config)
        runner.register_hook(RestoreHook())
        return runner, runner.test()

    return run


def test_quantized_checkpoint_is_run_quantized(train: Callable, steps_of: Callable, measure: Callable) -> None:
    for step in steps_of(train())[1:]:
        runner, metrics = measure(step['checkpoint'])
        assert metrics == step['metrics']
        assert is_prepared(runner.model)
        assert measure(step['checkpoint'], hook=True)[1] == step['metrics']


def test_fp32_checkpoint_is_left_alone(checkpoint: Path, measure: Callable, log_of: Callable[[Runner], str]) -> None:
    runner, metrics = measure(str(checkpoint))
    assert metrics['toy/accuracy'] >= 0
    assert not is_prepared(runner.model)
    assert 'GPLQ' not in log_of(runner).partition('Load checkpoint')[0].rpartition('Hooks will be executed')[2]


@pytest.fixture
def partial(checkpoint: Path, tmp_path: Path) -> str:
    saved = torch.load(checkpoint, weights_only=True)
    saved['state_dict'].pop('head.bias')
    torch.save(saved, tmp_path / 'partial.pth')
    return str(tmp_path / 'partial.pth')


def test_a_part_of_a_model_is_not_measured(partial: str, measure: Callable) -> None:
    with pytest.raises(CheckpointError, match=r"1 of \d+ tensors are missing, such as \['head.bias'\]"):
        measure(partial)


def test_the_first_blocks_of_a_deeper_model_are_not_measured(
    toy: ModuleType, tmp_path: Path, measure: Callable
) -> None:
    torch.save({'state_dict': toy.ToyClassifier(depth=3).state_dict()}, tmp_path / 'deep.pth')
    with pytest.raises(CheckpointError, match='deep.pth is of a deeper model'):
        measure(str(tmp_path / 'deep.pth'))


def test_fp32_training_may_start_from_a_part(partial: str, make_config: Callable[..., Config]) -> None:
    config = make_config('train')
    config.load_from = partial
    config.default_hooks.pop('gplq')
    runner = Runner.from_cfg(config)
    runner.register_hook(RestoreHook())
    runner.train()
    assert runner.iter > 0


def test_a_broken_checkpoint_is_refused_before_it_is_loaded(tmp_path: Path, measure: Callable) -> None:
    path = tmp_path / 'text.pth'
    path.write_text('<html>not found</html>')
    with pytest.raises(CheckpointError, match='is text'):
        measure(str(path))


def test_training_in_fp32_from_a_quantized_checkpoint_is_refused(
    train: Callable, steps_of: Callable, make_config: Callable[..., Config]
) -> None:
    config = make_config('train')
    config.load_from = steps_of(train())[-1]['checkpoint']
    config.default_hooks.pop('gplq')
    runner = Runner.from_cfg(config)
    runner.register_hook(RestoreHook())
    with pytest.raises(CheckpointError, match='holds a quantized model.*FP32 checkpoint'):
        runner.train()
