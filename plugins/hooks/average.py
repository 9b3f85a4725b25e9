"""Averaged weights (EMAHook): once training is over they are the model."""

from __future__ import annotations

from mmengine.hooks import EMAHook, Hook
from mmengine.runner import Runner
from mmengine.runner.priority import get_priority

from gplq.errors import StageError

__all__ = ['adopt_average', 'copy_anew', 'refuse_earlier']


def refuse_earlier(runner: Runner, hook: Hook) -> None:
    """Refuse hooks that would copy the model before ``hook`` inserts the quantizers.

    Raises:
        StageError: naming the priority.
    """
    for other in runner.hooks:
        if isinstance(other, EMAHook) and get_priority(other.priority) <= get_priority(hook.priority):
            raise StageError(
                f'{type(other).__name__} has the priority {other.priority} and would copy the model before '
                f"{type(hook).__name__} ({hook.priority}) inserts the quantizers: set priority='NORMAL' for it"
            )


def copy_anew(runner: Runner) -> None:
    """Let the hooks that average copy the model again: a checkpoint has brought quantizers that their copy lacks."""
    for hook in runner.hooks:
        if isinstance(hook, EMAHook):
            hook.before_run(runner)


def adopt_average(runner: Runner, *, trained: bool) -> None:
    """Put the averaged weights and scales into the model and retire the hooks that average.

    They would otherwise put the average, whose weights nobody rounded, into the checkpoint of the weight stage.

    Args:
        runner: at the end of its training.
        trained: False where no step was taken, so that there is no average yet.
    """
    averaging = [hook for hook in runner.hooks if isinstance(hook, EMAHook)]
    for hook in averaging:
        if trained:
            hook._swap_ema_parameters()
    # A new list: the runner is going through the old one.
    runner._hooks = [hook for hook in runner.hooks if hook not in averaging]
