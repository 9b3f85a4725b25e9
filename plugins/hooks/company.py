"""Which of our hooks may be in a config together."""

from __future__ import annotations

from mmengine.hooks import Hook
from mmengine.runner import Runner

from gplq.errors import StageError

__all__ = ['refuse_beside']


def refuse_beside(runner: Runner, hook: Hook, *kinds: type[Hook]) -> None:
    """Refuse another hook that would quantize the model a second time.

    Args:
        runner: with all of its hooks.
        hook: the one that asks.
        kinds: hooks that it cannot be together with, its own kind as a rule.

    Raises:
        StageError: naming both hooks.
    """
    if any(type(other).__name__ == 'MeanTeacherHook' for other in runner.hooks):
        raise StageError(
            'MeanTeacherHook pairs the parameters of student and teacher one by one, of which quantizers would be in '
            'the student alone: quantize the student as a detector of its own, without that hook'
        )
    others = [type(other).__name__ for other in runner.hooks if isinstance(other, kinds) and other is not hook]
    if others:
        raise StageError(
            f'the config has {others[0]} beside {type(hook).__name__}: GPLQHook is both stages, ActivationQATHook and '
            'WeightPTQHook one each; leave one of the two out (default_hooks, custom_hooks)'
        )
