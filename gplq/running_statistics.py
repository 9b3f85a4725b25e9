"""Running statistics of normalization layers: a training forward moves them before its loss can be judged."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ['RunningStatistics']


class RunningStatistics:
    """What the next forward pass in training mode moves, kept so that its step can be given up.

    Args:
        model: about to run.
    """

    def __init__(self, model: nn.Module) -> None:
        kinds = nn.modules.batchnorm._NormBase
        moving = [module for module in model.modules() if module.training and isinstance(module, kinds)]
        self._kept = [(buffer, buffer.clone()) for module in moving for buffer in module.buffers(recurse=False)]

    @torch.no_grad()
    def restore(self) -> None:
        """Put them back."""
        for buffer, before in self._kept:
            buffer.copy_(before)
