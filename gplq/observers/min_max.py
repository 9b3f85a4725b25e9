"""The full range of what was seen."""

from __future__ import annotations

import torch
from torch import Tensor

from gplq.observers.base import Observer, Range

__all__ = ['MinMaxObserver']


class MinMaxObserver(Observer):
    """Represents every value seen (GPLQ sec. 3.2: initialization of per-channel scales)."""

    def _collect(self, groups: Tensor) -> None:
        pass

    def _pool(self, groups: int, device: torch.device) -> None:
        pass

    def range(self) -> Range:
        return self.seen
