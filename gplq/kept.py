"""What a quantizer keeps for backward: its codes, two a byte where they fit, and the rounding error in 8 bit.

A quantized product needs no more of its operands. Kept as floats they are the larger part of a training step's memory.
"""

from __future__ import annotations

from types import EllipsisType
from typing import NamedTuple

import torch
from torch import Tensor

from gplq.grid import Grid, dequantize_, steps_of

__all__ = ['Kept', 'gradients', 'keep', 'restore']

# Rounding errors lie within half a step: bytes 1 to 255, and 0 for what is clipped.
_ERROR_STEPS = 254
_NO_ERROR = 128
_BYTES = 256
# Elements that a CPU rounds at once: few enough for what is computed on the way to stay in its cache.
_TOGETHER = 1 << 18
# torch's conversion of floats to bytes is three times as fast by way of this.
_ON_THE_WAY = torch.int16


class Kept(NamedTuple):
    """Codes and rounding errors of a tensor; a tuple of tensors, as ``save_for_backward`` takes them.

    Codes are a matrix of bytes with a row for each part of the tensor that was rounded at once; the last part may be
    shorter than its row. At most 16 different ones lie two a byte, the first half of a part in the lower bits. Errors
    lie in memory as the tensor does.
    """

    codes: Tensor
    errors: Tensor


def keep(x: Tensor, grid: Grid, dtype: torch.dtype) -> tuple[Kept, Tensor]:
    """Round ``x``; what to keep of it, and the quantized values as ``dtype``, in the memory order of ``x``."""
    parts = _parts(x, grid, _count(x))
    # The first part is the longest.
    codes = torch.empty(len(parts), _bytes(x[parts[0].rows].numel(), grid), dtype=torch.uint8, device=x.device)
    errors = torch.empty_like(x, dtype=torch.uint8)
    values = torch.empty_like(x, dtype=dtype)
    no_error = torch.full((), _NO_ERROR + 0.5, dtype=grid.scale.dtype, device=x.device)
    for part, packed in zip(parts, codes, strict=True):
        own = part.grid
        steps = steps_of(x[part.rows], own)
        rounded = steps.round().clamp_(own.qmin, own.qmax)
        _pack(rounded, own, packed)
        of_part = torch.add(no_error, rounded - steps, alpha=_ERROR_STEPS)
        errors[part.rows] = _inside(of_part, steps, own.qmin, own.qmax).to(_ON_THE_WAY)
        values[part.rows] = dequantize_(rounded, own)
    return Kept(codes, errors), values


def restore(kept: Kept, grid: Grid, dtype: torch.dtype) -> Tensor:
    """The quantized values as ``dtype``, to the last bit."""
    values = torch.empty_like(kept.errors, dtype=dtype)
    for part, packed in zip(_parts(kept.errors, grid, len(kept.codes)), kept.codes, strict=True):
        values[part.rows] = dequantize_(_unpack(packed, kept.errors[part.rows], part.grid), part.grid)
    return values


def gradients(kept: Kept, gradient: Tensor, grid: Grid, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of input, scale and offset from that of the quantized values.

    LSQ (Esser et al. 2020, eq. 3; LSQ+ eq. 5 for the offset): to the input straight through where nothing is clipped;
    to the scale the rounding error there and the bound elsewhere; to the offset only where it is clipped.

    Args:
        kept: of the input.
        gradient: of the quantized values.
        grid: on which they lie.
        dtype: of the input's gradient.
    """
    to_input = torch.empty_like(kept.errors, dtype=dtype)
    to_scale = torch.zeros_like(grid.scale)
    to_offset = None if grid.offset is None else torch.zeros_like(grid.offset)
    for part, packed in zip(_parts(kept.errors, grid, len(kept.codes)), kept.codes, strict=True):
        own = part.grid
        incoming = gradient[part.rows].to(own.scale.dtype)
        errors = kept.errors[part.rows].to(own.scale.dtype)
        passed = _inside(incoming, errors, 0, _BYTES)
        stopped = incoming - passed
        bound = _unpack(packed, errors, own)
        if own.offset is not None:
            bound.add_(own.offset)
        slope = bound.mul_(stopped).addcmul_(passed, errors.sub_(_NO_ERROR), value=1 / _ERROR_STEPS)
        _rows_of(to_scale, part.rows, errors.dim()).add_(slope.sum_to_size(own.scale.shape), alpha=grid.factor)
        if to_offset is not None and own.offset is not None:
            shift = stopped.mul_(own.scale).sum_to_size(own.offset.shape)
            _rows_of(to_offset, part.rows, errors.dim()).add_(shift, alpha=grid.factor)
        to_input[part.rows] = passed
    return to_input, to_scale, to_offset


class _Part(NamedTuple):
    """Leading rows of a tensor, and the grid they lie on."""

    rows: slice | EllipsisType
    grid: Grid


def _count(x: Tensor) -> int:
    """In how many parts to round ``x``: one on a GPU or in a compiled graph, on a CPU parts that stay in its cache."""
    if x.device.type != 'cpu' or torch.compiler.is_compiling() or x.dim() == 0 or x.numel() <= _TOGETHER:
        return 1
    together = max(1, _TOGETHER * len(x) // x.numel())
    return -(-len(x) // together)


def _parts(x: Tensor, grid: Grid, count: int) -> list[_Part]:
    """``x`` in so many parts of equally many leading rows, the last one of what is left."""
    if count == 1:
        return [_Part(..., grid)]
    parts = []
    together = -(-len(x) // count)
    for first in range(0, len(x), together):
        rows = slice(first, first + together)
        scale = _rows_of(grid.scale, rows, x.dim())
        offset = None if grid.offset is None else _rows_of(grid.offset, rows, x.dim())
        parts.append(_Part(rows, grid._replace(scale=scale, offset=offset)))
    return parts


def _rows_of(parameter: Tensor, rows: slice | EllipsisType, dimensions: int) -> Tensor:
    """The rows' own of a scale or offset that broadcasts against a tensor of so many dimensions."""
    shared = rows is ... or parameter.dim() < dimensions or len(parameter) == 1
    return parameter if shared else parameter[rows]


def _inside(x: Tensor, position: Tensor, low: float, high: float) -> Tensor:
    """``x`` where ``low < position < high``, else 0, in one pass."""
    inside: Tensor = torch.ops.aten.hardtanh_backward(x, position, low, high)
    return inside


def _wide(grid: Grid) -> bool:
    """Whether a code takes a byte of its own."""
    return grid.qmax - grid.qmin >= 16


def _bytes(codes: int, grid: Grid) -> int:
    """Bytes that so many codes take."""
    return codes if _wide(grid) else (codes + 1) // 2


def _pack(codes: Tensor, grid: Grid, packed: Tensor) -> None:
    values = codes.reshape(-1)
    packed = packed[: _bytes(values.numel(), grid)]
    middle = packed.numel()
    lower = values[:middle] - grid.qmin
    if not _wide(grid):
        lower[: values.numel() - middle].add_(values[middle:] - grid.qmin, alpha=16)
    packed.copy_(lower.to(_ON_THE_WAY))


def _unpack(packed: Tensor, like: Tensor, grid: Grid) -> Tensor:
    """The codes of a part, of the shape of ``like``, in the dtype of the scale and in memory of their own."""
    values = torch.empty(like.shape, dtype=grid.scale.dtype, device=packed.device)
    flat = values.view(-1)
    packed = packed[: _bytes(flat.numel(), grid)]
    if _wide(grid):
        flat.copy_(packed)
    else:
        middle = packed.numel()
        flat[:middle] = packed & 15
        flat[middle:] = (packed >> 4)[: flat.numel() - middle]
    return values.add_(grid.qmin)
