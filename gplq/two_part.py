"""Quantizers whose codes have two parts, each a whole number: products run on integers for each part."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from gplq.log_sqrt2 import log_sqrt2_levels, log_sqrt2_parts
from gplq.quantizer import Part, Quantizer
from gplq.spec import QuantizerSpec
from gplq.twin_uniform import MAX_SHIFT, twin_bounds, twin_parts

__all__ = ['TwoPartQuantizer', 'TwoPartScale', 'candidates', 'parts_of', 'propose']

CLIPS = tuple(torch.linspace(1.0, 0.2, 17).tolist())


class TwoPartScale(NamedTuple):
    """What decides the values: the scale, and for twin uniform the shift; both ``(groups,)``."""

    scale: Tensor
    shift: Tensor


def parts_of(x: Tensor, chosen: TwoPartScale, spec: QuantizerSpec) -> tuple[Part, Part]:
    """Both parts of the codes of ``x``; scale and shift broadcast against it."""
    if spec.scheme == 'twin_uniform':
        fine, coarse = twin_parts(x, chosen.scale, chosen.shift, spec.bits, bool(spec.signed))
        return Part(fine, torch.ones_like(chosen.scale)), Part(coarse, torch.exp2(chosen.shift))
    even, odd = log_sqrt2_parts(x, chosen.scale, spec.bits)
    return Part(even, torch.ones_like(chosen.scale)), Part(odd, torch.full_like(chosen.scale, math.sqrt(2)))


def steps_of_parts(parts: tuple[Part, Part]) -> Tensor:
    """The quantized values in units of the scale."""
    return parts[0].codes * parts[0].factor + parts[1].codes * parts[1].factor


def candidates(low: Tensor, high: Tensor, spec: QuantizerSpec) -> Iterator[TwoPartScale]:
    """Scales to choose from for values between ``low`` and ``high``, ``(groups,)`` each.

    Twin uniform: the coarse half reaches to a share of ``high``, and the fine step is a power of two smaller
    (PTQ4ViT sec. 3.2); or the fine half reaches to a share of ``low``, as that of GELU outputs does in the paper, and
    the coarse half about to ``high``. Log: the largest code is a share of ``high``.
    """
    tiny = torch.finfo(high.dtype).tiny
    top, bottom = high.clamp(min=0), low.clamp(max=0)
    for clip in CLIPS:
        if spec.scheme == 'log_sqrt2':
            smallest = top * clip / math.sqrt(2) ** (log_sqrt2_levels(spec.bits) - 1)
            yield TwoPartScale(smallest.clamp(min=tiny), torch.zeros_like(top))
            continue
        (fine_low, _), (_, coarse_high) = twin_bounds(spec.bits, bool(spec.signed))
        for shift in range(MAX_SHIFT + 1):
            yield TwoPartScale((clip * top / coarse_high / 2**shift).clamp(min=tiny), torch.full_like(top, shift))
        if fine_low < 0:
            fine = (clip * bottom / fine_low).clamp(min=tiny)
            # The shift at which the coarse half just holds the largest value, and its neighbours.
            enough = (top / coarse_high / fine).clamp(min=1).log2().ceil()
            for beside in (-1, 0, 1):
                yield TwoPartScale(fine, (enough + beside).clamp(0, MAX_SHIFT))


def propose(values: Tensor, low: Tensor, high: Tensor, spec: QuantizerSpec) -> TwoPartScale:
    """The candidate of least squared error of ``values``, ``(groups, elements)``."""
    best: TwoPartScale | None = None
    least = torch.full_like(low, torch.inf)
    for candidate in candidates(low, high, spec):
        wide = TwoPartScale(*(t[:, None] for t in candidate))
        restored = steps_of_parts(parts_of(values, wide, spec)) * wide.scale
        error = (restored - values).square_().mean(dim=1)
        better = error < least
        least = torch.where(better, error, least)
        best = candidate if best is None else TwoPartScale(*(map(torch.where, (better, better), candidate, best)))
    assert best is not None
    return best


class TwoPartQuantizer(Quantizer):
    """A quantizer of the schemes ``twin_uniform`` and ``log_sqrt2``; see :class:`Quantizer`.

    Its ``scale`` is the fine step, or the smallest value; ``shift`` says how many times two the coarse step is.
    """

    shift: Tensor

    def __init__(self, spec: QuantizerSpec, shape: tuple[int, ...], merged_heads: int = 0) -> None:
        super().__init__(spec, shape, merged_heads)
        self.register_buffer('shift', torch.zeros(shape))

    @property
    def settled(self) -> bool:
        """Never: the operations that round by themselves know uniform grids alone."""
        return False

    def forward(self, x: Tensor) -> Tensor:
        if self.observer is not None or not self.enabled:
            return super().forward(x)
        split = self.split_heads(x)
        factor = self.scale_gradient
        scale = self.scale * factor + (self.scale * (1 - factor)).detach()
        steps = split.to(scale.dtype) / scale
        with torch.no_grad():
            rounded = steps_of_parts(self.parts(x))
            rounded = self.split_heads(rounded)
        low, high = self.bounds()
        # Straight through where values can be represented; LSQ's gradient of the scale follows.
        inside = torch.maximum(torch.minimum(steps, high), low)
        y = (inside + (rounded - inside).detach()) * scale
        return self._dropped(x, y.to(x.dtype).view(x.shape))

    def codes(self, x: Tensor) -> Tensor:
        """Values in units of the scale; whole numbers for twin uniform."""
        return steps_of_parts(self.parts(x)).reshape(x.shape)

    def parts(self, x: Tensor) -> tuple[Part, Part]:
        split = self.split_heads(x.to(self.scale.dtype))
        found = parts_of(split, TwoPartScale(self.scale.detach(), self.shift.round().clamp(0, MAX_SHIFT)), self.spec)
        first, second = (Part(part.codes.reshape(x.shape), self.over(part.factor, len(x))) for part in found)
        return first, second

    def set_shift(self, shift: Tensor) -> None:
        """Take the shift that calibration found, as many elements as there are scales."""
        with torch.no_grad():
            self.shift.copy_(shift.reshape(self.shape))

    def bounds(self) -> tuple[Tensor, Tensor]:
        if self.spec.scheme == 'log_sqrt2':
            zero = torch.zeros_like(self.shift)
            return zero, zero + math.sqrt(2) ** (log_sqrt2_levels(self.spec.bits) - 1)
        (low, _), (_, high) = twin_bounds(self.spec.bits, bool(self.spec.signed))
        return torch.full_like(self.shift, low), high * torch.exp2(self.shift)
