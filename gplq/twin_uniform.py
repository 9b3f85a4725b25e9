"""Twin uniform quantization (PTQ4ViT sec. 3.2): half of the codes with a fine step, half with a coarse one."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ['MAX_SHIFT', 'twin_bounds', 'twin_parts', 'twin_table']

# The paper's shifts; a larger one would leave the coarse half a single step of use.
MAX_SHIFT = 15


def twin_bounds(bits: int, signed: bool) -> tuple[tuple[int, int], tuple[int, int]]:
    """Smallest and largest code of the fine and of the coarse half.

    One bit says which half, the others hold the magnitude. Unsigned (attention maps): small values are fine, large
    ones coarse. Signed (GELU outputs): negative values are fine, positive ones coarse.
    """
    half = 2 ** (bits - 1)
    return ((-half, 0) if signed else (0, half - 1)), (0, half - 1)


def twin_parts(x: Tensor, scale: Tensor, shift: Tensor, bits: int, signed: bool) -> tuple[Tensor, Tensor]:
    """Codes of both halves, at most one of which is not zero: values are ``scale * (fine + 2**shift * coarse)``.

    The nearer of the two halves' values is taken. (The released code adds them instead, which gives every large
    value the fine half's bound on top.)

    Args:
        x: any shape.
        scale: the fine step, broadcasts against ``x``.
        shift: whole numbers from 0 up, broadcasts like ``scale``: the coarse step is ``2**shift`` fine ones, so that
            an integer machine adds both halves' products by a shift.
        bits: 2 to 8.
        signed: which halves, see :func:`twin_bounds`.

    Returns:
        Fine and coarse codes as floats of ``x``'s shape.
    """
    (fine_low, fine_high), (coarse_low, coarse_high) = twin_bounds(bits, signed)
    steps = x / scale
    ratio = torch.exp2(shift.to(steps.dtype))
    fine = steps.round().clamp_(fine_low, fine_high)
    coarse = (steps / ratio).round_().clamp_(coarse_low, coarse_high)
    take_fine = (fine - steps).abs_() <= (coarse * ratio).sub_(steps).abs_()
    return fine.mul_(take_fine), coarse.mul_(~take_fine)


def twin_table(bits: int, shift: int, signed: bool) -> Tensor:
    """Every representable value in fine steps, ascending; zero has two codes, and halves may share others."""
    (fine_low, fine_high), (coarse_low, coarse_high) = twin_bounds(bits, signed)
    coarse = {code * 2**shift for code in range(coarse_low, coarse_high + 1)}
    return torch.tensor(sorted({*range(fine_low, fine_high + 1), *coarse}))
