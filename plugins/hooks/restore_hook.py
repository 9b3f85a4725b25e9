"""A quantized checkpoint under a config that says nothing of quantization: measured as it is, refused in training."""

from __future__ import annotations

from typing import Any

from mmengine.hooks import Hook
from mmengine.runner import Runner

from gplq.errors import CheckpointError
from gplq.plugins.hooks.activation_qat_hook import ActivationQATHook
from gplq.plugins.hooks.checkpoints import quantization_of
from gplq.plugins.hooks.gplq_hook import GPLQHook
from gplq.plugins.hooks.model import model_of, trains
from gplq.plugins.hooks.weight_ptq_hook import WeightPTQHook
from gplq.record import is_prepared
from gplq.serialization import adopt, describe

__all__ = ['RestoreHook']


class RestoreHook(Hook):
    """Rebuilds the quantized model from its checkpoint; FP32 checkpoints are left to mmengine.

    mmengine alone would load the tensors whose names the FP32 model knows, and measure or train a model that is
    neither.
    """

    priority = 'ABOVE_NORMAL'

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Keep the quantization of a model that was built with it, such as the frozen backbone of a linear probe."""
        model = model_of(runner)
        if is_prepared(model):
            checkpoint['meta'].setdefault('gplq', describe(model))

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        ours = (ActivationQATHook, GPLQHook, WeightPTQHook)
        if quantization_of(checkpoint) is None or any(isinstance(hook, ours) for hook in runner.hooks):
            return
        model = model_of(runner)
        if is_prepared(model):
            # Built quantized, such as a linear probe that goes on.
            adopt(model, quantization_of(checkpoint) or {})
            return
        if trains(runner):
            source = runner._load_from or 'of --resume'
            raise CheckpointError(
                f'the checkpoint ({source}) holds a quantized model, which training in FP32 would lose: '
                'start from an FP32 checkpoint, or go on under the config that has the hook'
            )
        runner.logger.info('GPLQ: the checkpoint holds a quantized model; it is run quantized')
        ActivationQATHook().after_load_checkpoint(runner, checkpoint)
