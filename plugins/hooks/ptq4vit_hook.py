"""PTQ4ViT inside a Runner: no training, before validation or test."""

from __future__ import annotations

from typing import Any

from mmengine.registry import HOOKS
from mmengine.runner import Runner

from gplq.errors import RecipeError
from gplq.plugins.hooks.model import model_of, trains
from gplq.plugins.hooks.randomness import seeded
from gplq.plugins.hooks.stopwatch import Stopwatch
from gplq.plugins.hooks.weight_ptq_hook import WeightPTQHook
from gplq.record import is_prepared
from gplq.spec import FLOAT_BITS

__all__ = ['PTQ4ViTHook']


@HOOKS.register_module()
class PTQ4ViTHook(WeightPTQHook):
    """Quantizes the FP32 model of `load_from` or of the tested checkpoint by calibration alone.

    Example:
        >>> default_hooks = dict(gplq=dict(type='gplq.plugins.PTQ4ViTHook', weight_bits=6, activation_bits=6))

    It runs before `tools/test.py` measures, as before the validation of `tools/train.py`, which trains nothing then.
    Arguments are those of :meth:`gplq.plugins.hooks.settings.HookSettings.from_config`, with 8 bits as default;
    `search=dict(metric=..., objective=...)` sets how scales are found (:class:`gplq.ScaleSearch`).
    """

    def __init__(self, **config: Any) -> None:
        bits = {} if 'recipe' in config else {'weight_bits': 8, 'activation_bits': 8}
        super().__init__(**{'method': 'ptq4vit', **bits, **config})
        recipe = self._activations.settings.recipe
        if recipe.quantizes and recipe.weight_bits == FLOAT_BITS:
            raise RecipeError(
                f'PTQ4ViTHook: weight_bits={recipe.weight_bits} leaves out the weights, whose scales it searches '
                "with the inputs': set 2 to 8"
            )
        self._minutes: float | None = None

    def before_val(self, runner: Runner) -> None:
        self._before(runner)

    def before_test(self, runner: Runner) -> None:
        self._before(runner)

    def _before(self, runner: Runner) -> None:
        model = model_of(runner)
        # In training the stages come in their own order; a checkpoint may be quantized already.
        if trains(runner) or is_prepared(model) or not self._activations.settings.recipe.quantizes:
            return
        clock = Stopwatch()
        clock.start()
        hook = self._activations
        hook.prepare(runner, model)
        with seeded(hook.settings.seed):
            hook.calibrate(runner, model)
        self._quantize(runner)
        clock.stop()
        self._minutes = clock.minutes

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        super().after_val_epoch(runner, metrics)
        self._after(runner, metrics)

    def after_test_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        self._after(runner, metrics)

    def _after(self, runner: Runner, metrics: dict[str, float] | None) -> None:
        if self._minutes is not None:
            minutes, self._minutes = self._minutes, None
            self._finish(runner, minutes, {k: float(v) for k, v in (metrics or {}).items()})
