"""Regularization of weights that are rounded while the model trains, as one of its losses."""

from __future__ import annotations

from typing import Any

from mmengine.runner import Runner
from torch import nn

from gplq.activation_stage import ActivationStage
from gplq.weight_training import weight_regularization

__all__ = ['RegularizationTerm']


class RegularizationTerm:
    """Adds the regularization to the losses that the model returns; it grows with the share of the run that is over."""

    def __init__(self, runner: Runner, stage: ActivationStage) -> None:
        self.runner = runner
        self.stage = stage

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        if not (module.training and isinstance(output, dict)):
            return output
        share = min(1.0, self.runner.iter / self.runner.max_iters)
        stage = self.stage
        loss = weight_regularization(module, share, stage.regularization, stage.regularization_start)
        return {**output, 'loss_regularization': loss}

    def __deepcopy__(self, memo: dict[int, Any]) -> RegularizationTerm:
        # Belongs to the run; a copy of the model, such as an average, does not train.
        return self
