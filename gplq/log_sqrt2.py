"""Quantization by powers of the square root of two (RepQ-ViT sec. 3.3), for attention maps."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ['log_sqrt2_levels', 'log_sqrt2_parts']

# Powers are whole numbers of at most 16 bits, so that integers hold them.
MAX_LEVELS = 31


def log_sqrt2_levels(bits: int) -> int:
    """How many values other than zero there are; one code is left for zero.

    (The released code maps to zero what lies below its last code, which makes one value more than the bits hold.)
    """
    return int(min(2**bits - 1, MAX_LEVELS))


def log_sqrt2_parts(x: Tensor, scale: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Powers of two of both kinds, at most one of which is not zero: ``scale * (even + sqrt(2) * odd)``.

    ``x >= 0`` is rounded to the nearest power of the root of two, in the logarithm, or to zero more than a
    quarter of an octave under the smallest. An even power is a shift by itself, an odd one a shift and one factor for
    all of them.

    Args:
        x: any shape, not negative.
        scale: the smallest value but zero, broadcasts against ``x``.
        bits: 2 to 8.

    Returns:
        Even and odd powers as floats of ``x``'s shape.
    """
    largest = log_sqrt2_levels(bits) - 1
    exponent = (2 * torch.log2((x / scale).clamp_(min=torch.finfo(x.dtype).tiny))).round_()
    exponent.clamp_(max=largest)
    odd = exponent.remainder(2)
    power = torch.exp2((exponent - odd) / 2).mul_(exponent >= 0)
    return power * (1 - odd), power * odd
