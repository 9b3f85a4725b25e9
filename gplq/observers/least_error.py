"""Which of several ranges costs least."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from gplq.functional import dequantize, quantize
from gplq.observers.base import Range, scale_from_range
from gplq.spec import QuantizerSpec

__all__ = ['least_error']


def least_error(values: Tensor, ranges: Iterable[Range], spec: QuantizerSpec) -> Range:
    """The range of least mean squared error of rounding and clipping, of each row its own; the first of equal ones.

    Args:
        values: ``(groups, elements)``.
        ranges: candidates, at least one, ends of shape ``(groups,)``.
        spec: of the codes.
    """
    candidates = iter(ranges)
    best = next(candidates)
    least = _error(values, best, spec)
    for candidate in candidates:
        error = _error(values, candidate, spec)
        better = error < least
        least = torch.where(better, error, least)
        best = Range(torch.where(better, candidate.low, best.low), torch.where(better, candidate.high, best.high))
    return best


def _error(values: Tensor, ends: Range, spec: QuantizerSpec) -> Tensor:
    scale, offset = scale_from_range(*ends, spec)
    step = scale[:, None]
    shift = None if offset is None else offset[:, None]
    restored = dequantize(quantize(values, step, spec.qmin, spec.qmax, shift), step, shift)
    return (restored - values).square().mean(dim=1)
