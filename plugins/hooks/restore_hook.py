"""Checkpoints under a config that says nothing of quantization: quantized ones are measured as they are."""

from __future__ import annotations

from typing import Any

from mmengine.hooks import Hook
from mmengine.runner import Runner

from gplq.errors import CheckpointError
from gplq.plugins.checkpoint_file import quantization_of
from gplq.plugins.hooks.activation_qat_hook import ActivationQATHook
from gplq.plugins.hooks.checkpoints import check_keys, check_source
from gplq.plugins.hooks.gplq_hook import GPLQHook
from gplq.plugins.hooks.model import model_of, trains
from gplq.plugins.hooks.weight_ptq_hook import WeightPTQHook
from gplq.record import is_prepared
from gplq.serialization import adopt, describe

__all__ = ['RestoreHook']


class RestoreHook(Hook):
    """Rebuilds the quantized model from its checkpoint, and refuses what mmengine would load by half.

    It takes the tensors whose names and shapes the model knows and leaves the others as they are: of a quantized
    checkpoint, or of another architecture, that would measure a model that nobody trained.
    """

    priority = 'ABOVE_NORMAL'

    def before_run(self, runner: Runner) -> None:
        if not (self._leaves(runner) or runner._has_loaded) and runner._load_from:
            check_source(runner)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Keep the quantization of a model that was built with it, such as the frozen backbone of a linear probe."""
        model = model_of(runner)
        if is_prepared(model):
            checkpoint['meta'].setdefault('gplq', describe(model))

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        if self._leaves(runner):
            return
        model = model_of(runner)
        if quantization_of(checkpoint) is None:
            if is_prepared(model):
                raise CheckpointError(
                    f'the checkpoint ({runner._load_from}) holds an FP32 model, whose weights would replace the '
                    "rounded ones that the model's init_cfg has brought: leave out load_from, or init_cfg"
                )
            # Training may well start from a part of a model, such as one of other classes.
            if not trains(runner):
                check_keys(model, checkpoint, str(runner._load_from))
            return
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

    @staticmethod
    def _leaves(runner: Runner) -> bool:
        """Whether a hook of the config sees to checkpoints."""
        return any(isinstance(hook, (ActivationQATHook, GPLQHook, WeightPTQHook)) for hook in runner.hooks)
