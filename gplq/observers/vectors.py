"""The range of every input channel together with whole input vectors, for a search over the layer's output."""

from __future__ import annotations

import torch
from torch import Tensor

from gplq.observers.base import Observer, Range
from gplq.observers.least_error import least_error
from gplq.observers.samples import ColumnSample
from gplq.quantiles import PERCENTILES, row_quantiles
from gplq.spec import QuantizerSpec

__all__ = ['VectorObserver']


class VectorObserver(Observer):
    """Min-max ranges, and a random sample of the vectors that the layer multiplied."""

    def __init__(self, limit: int = 512) -> None:
        super().__init__()
        self._sample = ColumnSample(limit)

    def _collect(self, groups: Tensor) -> None:
        self._sample.add(groups)

    def _pool(self, groups: int, device: torch.device) -> None:
        self._sample.pool(groups, device)

    def range(self) -> Range:
        return self.seen

    def percentiles(self, spec: QuantizerSpec) -> Range:
        """Of each channel the range between percentiles that costs least at ``spec`` (RepQ-ViT's released code)."""
        channels = self._sample.matrix()
        ranges = (row_quantiles(channels, 1 - share, share) for share in PERCENTILES)
        return least_error(channels, (Range(low, high) for low, high in ranges), spec)

    def vectors(self) -> Tensor:
        """``(vectors, channels)``."""
        return self._sample.matrix().t()
