"""Candidates for the scale of a quantizer, and which of them a search takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gplq.functional import dequantize, quantize
from gplq.quantizer import Quantizer
from gplq.two_part import TwoPartQuantizer, TwoPartScale, candidates, parts_of, steps_of_parts

__all__ = ['ScaleTrials', 'positive', 'trials_of']


class ScaleTrials(NamedTuple):
    """Candidates of a quantizer: scale and shift ``(candidates, *shape)``."""

    scale: Tensor
    shift: Tensor
    # Each one's share of the scale that represents the largest value.
    ratios: Sequence[float]

    def round(self, quantizer: Quantizer, values: Tensor, first: int, count: int) -> Tensor:
        """Values as some of the candidates round them, ``(count, *values.shape)``."""
        x = quantizer.split_heads(values)
        wide = (1,) * (x.dim() - len(quantizer.shape)) + quantizer.shape
        scale, shift = (t[first : first + count].reshape(-1, *wide) for t in (self.scale, self.shift))
        spec = quantizer.spec
        if isinstance(quantizer, TwoPartQuantizer):
            rounded = steps_of_parts(parts_of(x, TwoPartScale(scale, shift), spec)) * scale
        else:
            rounded = dequantize(quantize(x, scale, spec.qmin, spec.qmax), scale)
        return rounded.reshape(len(scale), *values.shape)

    def settle(self, quantizer: Quantizer, best: Tensor) -> None:
        """Take the candidates ``best``, ``(1, *shape)`` or one for all."""
        index = best.expand(1, *quantizer.shape)
        scale, shift = self.scale.gather(0, index)[0], self.shift.gather(0, index)[0]
        quantizer.initialize(
            scale, None, signed=bool(quantizer.spec.signed), elements=float(quantizer.elements_per_scale)
        )
        if isinstance(quantizer, TwoPartQuantizer):
            quantizer.set_shift(shift)


def trials_of(quantizer: Quantizer, low: Tensor, high: Tensor, ratios: Sequence[float], shared: bool) -> ScaleTrials:
    """Candidates for values between ``low`` and ``high``, ``(scales,)`` each.

    Args:
        quantizer: calibrated.
        low: smallest values.
        high: largest values.
        ratios: shares of the scale that represents the largest value; quantizers of two parts have their own.
        shared: whether scales run along the summed axis, so that one factor is chosen for all.
    """
    spec, shape = quantizer.spec, quantizer.shape
    if isinstance(quantizer, TwoPartQuantizer):
        found = list(candidates(low, high, spec))
        scale, shift = (torch.stack([one[part] for one in found]) for part in range(2))
        # The first of them represents the largest value.
        return ScaleTrials(scale.reshape(-1, *shape), shift.reshape(-1, *shape), [1.0] + [0.0] * (len(found) - 1))
    # As the released code has it: the largest value is half a step beyond the last code's.
    needed = high.clamp(min=0) / (spec.qmax + 0.5)
    if spec.qmin < 0:
        needed = torch.maximum(needed, low.clamp(max=0) / (spec.qmin - 0.5))
    needed = needed.reshape(shape)
    if shared:
        # Channels that are always zero need nothing, and have no say.
        now = quantizer.scale.detach()
        needed = now * positive((needed / now).amax())
    scale = torch.tensor(ratios).to(needed).reshape(-1, *(1,) * len(shape)) * positive(needed)
    return ScaleTrials(scale, torch.zeros_like(scale), ratios)


def positive(scale: Tensor) -> Tensor:
    """One instead of zero, which is no scale."""
    return torch.where(scale > 0, scale, torch.ones_like(scale))
