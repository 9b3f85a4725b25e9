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

# Smallest and largest code and LSQ's factor, of left and right.
_Bounds = tuple[tuple[int, int, float], tuple[int, int, float]]


def quantized_matmul(left: Tensor, right: Tensor, grids: tuple[Grid, Grid]) -> Tensor:
    """``matmul(fake_quantize(left), fake_quantize(right))``, values and gradients as if written out.

    Between forward and backward it keeps 1.5 bytes a value of either operand at 4 bits; nothing of a left operand that
    a softmax keeps for its own backward, which is rounded again there. Only gradients of the scales depend on the
    rounding error in 8 bit; those of the operands are exact.

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
        *(grid.scale for grid in grids),
        *(grid.offset for grid in grids),
        tuple((grid.qmin, grid.qmax, grid.factor) for grid in grids),
        product_dtype(left),
        _kept_by_softmax(left),
    )
    return y


def _kept_by_softmax(x: Tensor) -> bool:
    """Whether ``x`` stays in memory until backward anyway."""
    if torch.compiler.is_compiling() or x.grad_fn is None:
        return False
    return x.grad_fn.name() == 'SoftmaxBackward0' and x.is_contiguous()


class _QuantizedMatmul(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        left: Tensor,
        right: Tensor,
        left_scale: Tensor,
        right_scale: Tensor,
        left_offset: Tensor | None,
        right_offset: Tensor | None,
        bounds: _Bounds,
        dtype: torch.dtype,
        left_stays: bool,
    ) -> Tensor:
        parameters = (left_scale, right_scale, left_offset, right_offset)
        of_left, of_right = _grids(bounds, *parameters)
        # Heads are cut from one tensor by strides; what is dense is rounded, and multiplied, faster.
        kept_left, left_values = keep(left.contiguous(), of_left, dtype)
        kept_right, right_values = keep(right.contiguous(), of_right, dtype)
        ctx.save_for_backward(*((left, None) if left_stays else kept_left), *kept_right, *parameters)
        ctx.bounds, ctx.dtype, ctx.given, ctx.left_stays = bounds, dtype, (left.dtype, right.dtype), left_stays
        with torch.autocast(left.device.type, enabled=False):
            # ATen's own: a compiler traces this, and must not meet the modes that look for a model's products.
            y: Tensor = torch.ops.aten.matmul(left_values, right_values)
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *arguments: Tensor) -> tuple[Tensor | None, ...]:
        left_codes, left_errors, right_codes, right_errors, *parameters = ctx.saved_tensors
        of_left, of_right = _grids(ctx.bounds, *parameters)
        right = Kept(right_codes, right_errors)
        if ctx.left_stays:
            left, values = keep(left_codes, of_left, ctx.dtype)
        else:
            left = Kept(left_codes, left_errors)
            values = restore(left, of_left, ctx.dtype)
        gradient = arguments[0].to(ctx.dtype)
        with torch.autocast(gradient.device.type, enabled=False):
            incoming = torch.ops.aten.matmul(values.mT, gradient)
            del values
            to_right, to_right_scale, to_right_offset = gradients(right, incoming, of_right, ctx.given[1])
            incoming = torch.ops.aten.matmul(gradient, restore(right, of_right, ctx.dtype).mT)
            to_left, to_left_scale, to_left_offset = gradients(left, incoming, of_left, ctx.given[0])
        return to_left, to_right, to_left_scale, to_right_scale, to_left_offset, to_right_offset, None, None, None


def _grids(
    bounds: _Bounds, left_scale: Tensor, right_scale: Tensor, left_offset: Tensor | None, right_offset: Tensor | None
) -> tuple[Grid, Grid]:
    (low, high, factor), (right_low, right_high, right_factor) = bounds
    return (
        Grid(left_scale, low, high, left_offset, factor),
        Grid(right_scale, right_low, right_high, right_offset, right_factor),
    )
