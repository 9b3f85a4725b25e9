"""Stop a run before a step that would spoil the weights, and keep those that it has."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from mmengine.dist import all_reduce
from mmengine.runner import Runner
from torch import nn

from gplq.activation_stage import check_finite, check_gradients
from gplq.errors import TrainingError
from gplq.plugins.atomic_backend import BACKEND_ARGS
from gplq.plugins.hooks.resume import find_resume_point, iteration_of
from gplq.running_statistics import RunningStatistics

__all__ = ['LAST_GOOD', 'StepGuard']

LAST_GOOD = 'gplq_last_good.pth'


class StepGuard:
    """Watches losses and gradients; on the first that is not finite it sees to good weights and ends the run.

    Losses are watched for mixed precision, whose scaler skips a step with broken gradients and would skip every
    one; gradients, because a finite loss can have others.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._statistics: RunningStatistics | None = None
        # What the model was called with when it last gave a finite loss.
        self._good: tuple[Any, Any] | None = None
        self._probing = False

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
        if module.training and not self._probing:
            self._statistics = RunningStatistics(module)

    def _losses(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self._probing or not (module.training and isinstance(output, dict)):
            return
        total = _total(output)
        try:
            check_finite(total, self._runner.iter)
        except TrainingError as error:
            self._stop(error, diverged=self._diverged(module))
        self._good = args, kwargs

    def _gradients(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group['params']]
        try:
            check_gradients(parameters, self._runner.iter)
        except TrainingError as error:
            # The loss before it was finite, and with it the weights.
            self._stop(error, diverged=False)

    def _diverged(self, module: nn.Module) -> bool:
        """Whether weights, not data, broke a loss: the batch before, whose loss was finite, has none any more."""
        if self._good is None:
            return False
        args, kwargs = self._good
        self._probing = True
        try:
            with torch.no_grad():
                return not math.isfinite(_total(module(*args, **kwargs)))
        except (RuntimeError, ValueError, IndexError):
            # Heads choose boxes by scores; from those of broken weights they may not get any.
            return True
        finally:
            self._probing = False

    def _stop(self, error: TrainingError, *, diverged: bool) -> NoReturn:
        if self._statistics is not None:
            self._statistics.restore()
        runner = self._runner
        if not diverged:
            where = dict(epoch=runner.epoch, iter=runner.iter)
            runner.save_checkpoint(runner.work_dir, LAST_GOOD, meta=where, backend_args=dict(BACKEND_ARGS))
            raise TrainingError(f'{error}; they are in {Path(runner.work_dir) / LAST_GOOD}') from None
        earlier = find_resume_point(runner.work_dir)
        if earlier and iteration_of(Path(earlier)) >= runner.iter:
            # Written after the step that broke them.
            earlier = None
        raise TrainingError(
            f'{error}. Training has diverged: the batch before has no finite loss with them either. '
            + (f'Weights from before that are in {earlier}' if earlier else 'No earlier checkpoint was written')
        ) from None

    def __deepcopy__(self, memo: dict[int, Any]) -> StepGuard:
        # A copy of the model must not copy the runner.
        return self


def _total(losses: dict[str, Any]) -> float:
    """Of every rank: one alone must not stop, the others would wait for it."""
    total = torch.stack([_mean(value).float() for name, value in losses.items() if 'loss' in name]).sum()
    all_reduce(total)
    return float(total)


def _mean(value: Any) -> torch.Tensor:
    values = value if isinstance(value, (list, tuple)) else [value]
    return torch.stack([v.detach().mean() for v in values]).sum()
