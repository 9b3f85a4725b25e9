"""The clipping that makes the squared rounding and clipping error least."""

from __future__ import annotations

import torch
from torch import Tensor

from gplq.functional import dequantize, quantize
from gplq.observers.base import Observer, Range, scale_from_range
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
        values = self.values()
        best_scale, best_offset = scale_from_range(low, high, spec)
        least = torch.full_like(low, torch.inf)
        for ratio in self.ratios:
            scale, offset = scale_from_range(low * ratio, high * ratio, spec)
            step = scale[:, None]
            shift = None if offset is None else offset[:, None]
            restored = dequantize(quantize(values, step, spec.qmin, spec.qmax, shift), step, shift)
            error = (restored - values).square().mean(dim=1)
            better = error < least
            least = torch.where(better, error, least)
            best_scale = torch.where(better, scale, best_scale)
            if offset is not None and best_offset is not None:
                best_offset = torch.where(better, offset, best_offset)
        return best_scale, best_offset
