"""Stop a run before a step that would spoil the weights, and keep those that it has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import all_reduce
from mmengine.runner import Runner
from torch import nn

from gplq.activation_stage import check_finite, check_gradients
from gplq.errors import TrainingError
from gplq.plugins.atomic_backend import BACKEND_ARGS
from gplq.running_statistics import RunningStatistics

__all__ = ['LAST_GOOD', 'StepGuard']

LAST_GOOD = 'gplq_last_good.pth'


class StepGuard:
    """Watches losses and gradients; on the first that is not finite it saves the model and ends the run.

    Losses are watched for mixed precision, whose scaler skips a step with broken gradients and would skip every
    one; gradients, because a finite loss can have others.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._statistics: RunningStatistics | None = None

    @contextmanager
    def attached(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """Watch until the context ends."""
        handles = [
            model.register_forward_pre_hook(self._remember),
            model.register_forward_hook(self._losses, with_kwargs=True),
            optimizer.register_step_pre_hook(self._gradients),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _remember(self, module: nn.Module, args: Any) -> None:
        """Keep the running statistics: the forward pass moves them, before its loss can be seen."""
        if module.training:
            self._statistics = RunningStatistics(module)

    def _losses(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if module.training and isinstance(output, dict):
            losses = [_mean(value) for name, value in output.items() if 'loss' in name]
            total = torch.stack([loss.float() for loss in losses]).sum()
            # One rank alone must not stop: the others would wait for it.
            all_reduce(total)
            self._check(lambda: check_finite(float(total), self._runner.iter))

    def _gradients(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group['params']]
        self._check(lambda: check_gradients(parameters, self._runner.iter))

    def _check(self, check: Callable[[], None]) -> None:
        try:
            check()
        except TrainingError as error:
            if self._statistics is not None:
                self._statistics.restore()
            runner = self._runner
            where = dict(epoch=runner.epoch, iter=runner.iter)
            runner.save_checkpoint(runner.work_dir, LAST_GOOD, meta=where, backend_args=dict(BACKEND_ARGS))
            raise TrainingError(f'{error}; they are in {Path(runner.work_dir) / LAST_GOOD}') from None

    def __deepcopy__(self, memo: dict[int, Any]) -> StepGuard:
        # A copy of the model must not copy the runner.
        return self


def _mean(value: Any) -> torch.Tensor:
    values = value if isinstance(value, (list, tuple)) else [value]
    return torch.stack([v.detach().mean() for v in values]).sum()
