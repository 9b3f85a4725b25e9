"""What a quantizer keeps for backward: its codes, two a byte where they fit, and the rounding error in 8 bit.

A quantized product needs no more of its operands. Kept as floats they are the larger part of a training step's memory.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gplq.grid import Grid, dequantize_, steps_of

__all__ = ['Kept', 'gradients', 'keep', 'restore']

# Rounding errors lie within half a step.
_ERROR_STEPS = 254
_CLIPPED = -128


class Kept(NamedTuple):
    """Codes and rounding errors of a tensor; a tuple of tensors, as ``save_for_backward`` takes them."""

    codes: Tensor
    errors: Tensor


def keep(x: Tensor, grid: Grid) -> tuple[Kept, Tensor]:
    """Round ``x``; what to keep of it, and the quantized values in the dtype of the scale."""
    steps = steps_of(x, grid)
    codes = steps.round().clamp_(grid.qmin, grid.qmax)
    clipped = (steps <= grid.qmin) | (steps >= grid.qmax)
    errors = torch.sub(codes, steps, out=steps).mul_(_ERROR_STEPS).round_().masked_fill_(clipped, _CLIPPED)
    kept = Kept(_pack(codes, grid), errors.to(torch.int8))
    return kept, dequantize_(codes, grid)


def restore(kept: Kept, grid: Grid) -> Tensor:
    """The quantized values, to the last bit, in the dtype of the scale."""
    return dequantize_(_unpack(kept, grid), grid)


def gradients(kept: Kept, gradient: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of input, scale and offset from that of the quantized values.

    LSQ (Esser et al. 2020, eq. 3; LSQ+ eq. 5 for the offset): to the input straight through where nothing is clipped;
    to the scale the rounding error there and the bound elsewhere; to the offset only where it is clipped.

    Args:
        kept: of the input.
        gradient: of the quantized values.
        grid: on which they lie.
    """
    scale, offset = grid.scale, grid.offset
    clipped = kept.errors == _CLIPPED
    gradient = gradient.to(scale.dtype)
    to_input = gradient.masked_fill(clipped, 0.0)
    slope = kept.errors.to(scale.dtype).div_(_ERROR_STEPS)
    bound = _unpack(kept, grid)
    if offset is not None:
        bound.add_(offset)
    slope = torch.where(clipped, bound, slope).mul_(gradient)
    to_scale = slope.sum_to_size(scale.shape) * grid.factor
    if offset is None:
        return to_input, to_scale, None
    return to_input, to_scale, ((gradient - to_input) * scale).sum_to_size(offset.shape) * grid.factor


def _pack(codes: Tensor, grid: Grid) -> Tensor:
    """Codes as bytes; at most 16 different ones two a byte, the first half of the tensor in the lower bits."""
    values = (codes.reshape(-1) - grid.qmin).to(torch.uint8)
    if grid.qmax - grid.qmin >= 16:
        return values
    middle = (len(values) + 1) // 2
    packed = values[:middle].clone()
    packed[: len(values) - middle] += values[middle:] * 16
    return packed


def _unpack(kept: Kept, grid: Grid) -> Tensor:
    values = torch.empty(kept.errors.shape, dtype=grid.scale.dtype, device=kept.errors.device)
    flat = values.view(-1)
    if grid.qmax - grid.qmin >= 16:
        flat.copy_(kept.codes)
    else:
        middle = len(kept.codes)
        flat[:middle] = kept.codes & 15
        flat[middle:] = (kept.codes >> 4)[: len(flat) - middle]
    return values.add_(grid.qmin)
