"""Counting weights that go back and forth between two codes while they are trained."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ['OscillationCount']


class OscillationCount:
    """Follows the codes of one weight over training steps (Nagel et al. 2022, "Overcoming oscillations", sec. 3.1).

    A weight oscillates at a step where its code changes in the direction opposite to its last change. Its frequency is
    a moving average of that.

    Args:
        momentum: share of the newest step in the moving average.
    """

    def __init__(self, momentum: float = 0.01) -> None:
        self.momentum = momentum
        self.frequency: Tensor | None = None
        self._codes: Tensor | None = None
        self._direction: Tensor | None = None

    @torch.no_grad()
    def update(self, codes: Tensor) -> None:
        """Take the codes after a step, any shape, always the same."""
        codes = codes.to(torch.int16)
        if self._codes is None or self._direction is None or self.frequency is None:
            self._codes = codes
            self._direction = torch.zeros_like(codes, dtype=torch.int8)
            self.frequency = torch.zeros(codes.shape, device=codes.device)
            return
        change = (codes - self._codes).sign().to(torch.int8)
        oscillates = change * self._direction < 0
        self._direction = torch.where(change == 0, self._direction, change)
        self._codes = codes
        self.frequency.lerp_(oscillates.to(self.frequency.dtype), self.momentum)
