"""One more loss among those that a model returns in training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

__all__ = ['LossTerm']


class LossTerm:
    """A forward hook, so that the model is not wrapped; register it ``with_kwargs=True``.

    Args:
        name: the key in the model's losses, beginning with ``loss`` as mmengine adds up those.
        compute: the loss, a scalar, from the module and its first argument, mmengine's ``inputs``.
    """

    def __init__(self, name: str, compute: Callable[[nn.Module, Any], torch.Tensor]) -> None:
        self.name = name
        self.compute = compute

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if not (module.training and isinstance(output, dict)):
            return output
        inputs = args[0] if args else kwargs.get('inputs')
        return {**output, self.name: self.compute(module, inputs)}

    def __deepcopy__(self, memo: dict[int, Any]) -> LossTerm:
        # Belongs to the training of one model; a copy of the model, such as an average, does not train.
        return self
