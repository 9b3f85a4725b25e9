"""Both stages in their order: the two lines of a user's config."""

from __future__ import annotations

from typing import Any

from mmengine.registry import HOOKS
from mmengine.runner import Runner

from gplq.plugins.hooks.activation_qat_hook import ActivationQATHook
from gplq.plugins.hooks.company import refuse_beside
from gplq.plugins.hooks.composed import ComposedHook
from gplq.plugins.hooks.weight_ptq_hook import WeightPTQHook

__all__ = ['GPLQHook']


@HOOKS.register_module()
class GPLQHook(ComposedHook):
    """Takes the FP32 model in `load_from` to low bits: activations first, weights later.

    Example:
        >>> default_hooks = dict(gplq=dict(type='gplq.plugins.GPLQHook', weight_bits=4, activation_bits=4))
        >>> load_from = 'my_detector.pth'

    Arguments are those of :meth:`gplq.plugins.hooks.settings.HookSettings.from_config`. With 32 bits for both it
    trains the same schedule without quantizers: the control that tells quantization from further training.
    """

    priority = 'ABOVE_NORMAL'

    def __init__(self, **config: Any) -> None:
        self.activation_stage = ActivationQATHook(**config)
        self.weight_stage = WeightPTQHook(activations=self.activation_stage)
        self.parts = (self.activation_stage, self.weight_stage)

    def before_run(self, runner: Runner) -> None:
        refuse_beside(runner, self, GPLQHook, ActivationQATHook, WeightPTQHook)
        self.activation_stage.before_run(runner)
