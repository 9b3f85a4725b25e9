"""Uniform fake quantization as pure functions, with the gradients of LSQ."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gplq.grid import Grid
from gplq.kept import Kept, gradients, keep

__all__ = ['dequantize', 'fake_quantize', 'quantize']


def quantize(x: Tensor, scale: Tensor, qmin: int, qmax: int, offset: Tensor | None = None) -> Tensor:
    """Codes ``clamp(round(x / scale - offset), qmin, qmax)`` (GPLQ eq. 1; halves go to even).

    Shapes: ``x`` any; ``scale`` and ``offset`` broadcast against it. Codes have the dtype of ``x / scale``.
    """
    steps = x / scale
    if offset is not None:
        steps = steps - offset
    return steps.round_().clamp_(qmin, qmax)


def dequantize(codes: Tensor, scale: Tensor, offset: Tensor | None = None) -> Tensor:
    """Values ``scale * (codes + offset)``; shapes as in :func:`quantize`."""
    return codes * scale if offset is None else (codes + offset) * scale


class _FakeQuantize(torch.autograd.Function):
    """Quantize and dequantize in one node that keeps codes for backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, offset: Tensor | None, bounds: tuple[int, int], factor: float
    ) -> Tensor:
        kept, values = keep(x, Grid(scale, bounds[0], bounds[1], offset), x.dtype)
        ctx.save_for_backward(*kept, scale, offset)
        ctx.bounds, ctx.factor, ctx.dtype = bounds, factor, x.dtype
        return values

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *arguments: Tensor) -> tuple[Tensor | None, ...]:
        codes, errors, scale, offset = ctx.saved_tensors
        grid = Grid(scale, ctx.bounds[0], ctx.bounds[1], offset, ctx.factor)
        return *gradients(Kept(codes, errors), arguments[0], grid, ctx.dtype), None, None


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    qmin: int,
    qmax: int,
    offset: Tensor | None = None,
    scale_gradient: float = 1.0,
) -> Tensor:
    """``dequantize(quantize(x))`` with a straight-through gradient and LSQ's gradient for the scale.

    Args:
        x: any shape.
        scale: positive, broadcasts against ``x``, with no more axes.
        qmin: smallest code.
        qmax: largest code.
        offset: in steps, broadcasts against ``x``; None for a symmetric quantizer.
        scale_gradient: LSQ's factor ``g`` on the gradients of scale and offset (Esser et al. 2020, sec. 2.2).

    Returns:
        The quantized values, shape and dtype of ``x``; computed in the dtype of ``scale``. Quantizers keep that in
        FP32 whatever the model is cast to, since bfloat16 cannot tell neighboring 8-bit codes apart.
    """
    result: Tensor = _FakeQuantize.apply(  # type: ignore[no-untyped-call]
        x, scale, offset, (qmin, qmax), scale_gradient
    )
    return result
