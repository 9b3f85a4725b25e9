"""The clipping that makes the squared rounding and clipping error least."""

from __future__ import annotations

import torch
from torch import Tensor

from gplq.observers.base import Observer, Range, scale_from_range
from gplq.observers.least_error import least_error
from gplq.observers.samples import ColumnSample
from gplq.spec import QuantizerSpec

__all__ = ['MSEObserver']


class MSEObserver(Observer):
    """Shrinks the full range in even steps and keeps, a row, the one of least mean squared error."""

    def __init__(self, candidates: int = 40, smallest: float = 0.2, limit: int = 16384) -> None:
        super().__init__()
        self.ratios = torch.linspace(1.0, smallest, candidates).tolist()
        self._sample = ColumnSample(limit)

    def _collect(self, groups: Tensor) -> None:
        self._sample.add(groups)

    def _pool(self, groups: int, device: torch.device) -> None:
        self._sample.pool(groups, device)

    def range(self) -> Range:
        return self.seen

    def values(self) -> Tensor:
        """The sample ``(groups, elements)``."""
        return self._sample.matrix()

    def propose(self, spec: QuantizerSpec) -> tuple[Tensor, Tensor | None]:
        low, high = self.seen
        shrunk = (Range(low * ratio, high * ratio) for ratio in self.ratios)
        return scale_from_range(*least_error(self.values(), shrunk, spec), spec)
