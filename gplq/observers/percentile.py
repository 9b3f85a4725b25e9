"""A range that leaves the outermost values out."""

from __future__ import annotations

import torch
from torch import Tensor

from gplq.errors import RecipeError
from gplq.observers.base import Observer, Range
from gplq.observers.samples import ColumnSample
from gplq.quantiles import row_quantiles

__all__ = ['PercentileObserver']


class PercentileObserver(Observer):
    """The ``1 - p`` and ``p`` quantiles of a random sample (GPLQ sec. 3.2: 1st and 99th percentile)."""

    def __init__(self, percentile: float = 0.99, limit: int = 16384) -> None:
        super().__init__()
        if not 0.5 < percentile <= 1:
            raise RecipeError(f'percentile={percentile} is not in (0.5, 1]')
        self.percentile = percentile
        self._sample = ColumnSample(limit)

    def _collect(self, groups: Tensor) -> None:
        self._sample.add(groups)

    def _pool(self, groups: int, device: torch.device) -> None:
        self._sample.pool(groups, device)

    def range(self) -> Range:
        low, high = row_quantiles(self._sample.matrix(), 1 - self.percentile, self.percentile)
        return Range(low, high)
