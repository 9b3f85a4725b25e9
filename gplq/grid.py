"""How values are rounded: the grid of a uniform quantizer."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ['Grid', 'dequantize_', 'steps_of']


class Grid(NamedTuple):
    """Values ``scale * (code + offset)`` of codes between the bounds; scale and offset broadcast against them.

    ``factor`` is LSQ's ``g`` on the gradients of scale and offset (Esser et al. 2020, sec. 2.2).
    """

    scale: Tensor
    qmin: int
    qmax: int
    offset: Tensor | None = None
    factor: float = 1.0


def steps_of(x: Tensor, grid: Grid) -> Tensor:
    """``x / scale - offset`` in memory of its own, in the dtype of the scale."""
    # Memory that is written for the first time costs more than the arithmetic: what can be is done in place.
    steps = x / grid.scale if x.dtype == grid.scale.dtype else x.to(grid.scale.dtype).div_(grid.scale)
    return steps if grid.offset is None else steps.sub_(grid.offset)


def dequantize_(codes: Tensor, grid: Grid) -> Tensor:
    """Turn codes into values, in place."""
    if grid.offset is not None:
        codes.add_(grid.offset)
    return codes.mul_(grid.scale)
