"""A matrix product of two quantized operands that keeps codes for backward, not floats."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gplq.autocast import product_dtype
from gplq.grid import Grid
from gplq.kept import Kept, gradients, keep, restore

__all__ = ['quantized_matmul']


def quantized_matmul(left: Tensor, right: Tensor, grids: tuple[Grid, Grid]) -> Tensor:
    """``matmul(fake_quantize(left), fake_quantize(right))``, values and gradients as if written out.

    Between forward and backward it keeps 1.5 bytes a value of either operand at 4 bits. Only gradients of the scales
    depend on the rounding error in 8 bit; those of the operands are exact.

    Args:
        left: ``(..., n, k)``.
        right: ``(..., k, m)``, its leading axes those of ``left``.
        grids: of the two.

    Returns:
        ``(..., n, m)``.
    """
    y: Tensor = _QuantizedMatmul.apply(  # type: ignore[no-untyped-call]
        left,
        right,
        *(parameter for grid in grids for parameter in (grid.scale, grid.offset)),
        tuple((grid.qmin, grid.qmax, grid.factor) for grid in grids),
        product_dtype(left),
    )
    return y


class _QuantizedMatmul(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        left: Tensor,
        right: Tensor,
        left_scale: Tensor,
        left_offset: Tensor | None,
        right_scale: Tensor,
        right_offset: Tensor | None,
        bounds: tuple[tuple[int, int, float], tuple[int, int, float]],
        dtype: torch.dtype,
    ) -> Tensor:
        parameters = (left_scale, left_offset, right_scale, right_offset)
        of_left, of_right = _grids(parameters, bounds)
        # Heads are cut from one tensor by strides; what is dense is rounded, and multiplied, faster.
        kept_left, left_values = keep(left.contiguous(), of_left, dtype)
        kept_right, right_values = keep(right.contiguous(), of_right, dtype)
        ctx.save_for_backward(*kept_left, *kept_right, *parameters)
        ctx.bounds, ctx.dtype, ctx.given = bounds, dtype, (left.dtype, right.dtype)
        with torch.autocast(left.device.type, enabled=False):
            return torch.matmul(left_values, right_values)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *arguments: Tensor) -> tuple[Tensor | None, ...]:
        left_codes, left_errors, right_codes, right_errors, *parameters = ctx.saved_tensors
        left, right = Kept(left_codes, left_errors), Kept(right_codes, right_errors)
        of_left, of_right = _grids(tuple(parameters), ctx.bounds)
        gradient = arguments[0].to(ctx.dtype)
        with torch.autocast(gradient.device.type, enabled=False):
            incoming = gradient @ restore(right, of_right, ctx.dtype).mT
            to_left, *to_left_grid = gradients(left, incoming, of_left, ctx.given[0])
            incoming = restore(left, of_left, ctx.dtype).mT @ gradient
            to_right, *to_right_grid = gradients(right, incoming, of_right, ctx.given[1])
        return to_left, to_right, *to_left_grid, *to_right_grid, None, None


def _grids(
    parameters: tuple[Tensor | None, ...], bounds: tuple[tuple[int, int, float], tuple[int, int, float]]
) -> tuple[Grid, Grid]:
    """Grids of left and right from scale and offset of each in turn."""
    left, right = (
        Grid(scale, qmin, qmax, offset, factor)
        for scale, offset, (qmin, qmax, factor) in zip(parameters[::2], parameters[1::2], bounds, strict=True)
        if scale is not None
    )
    return left, right
