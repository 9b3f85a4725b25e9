"""Uniform fake quantization as pure functions, with the gradients of LSQ."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ['dequantize', 'fake_quantize', 'quantize']


def quantize(x: Tensor, scale: Tensor, qmin: int, qmax: int, offset: Tensor | None = None) -> Tensor:
    """Codes ``clamp(round(x / scale - offset), qmin, qmax)`` (GPLQ eq. 1; halves go to even).

    Shapes: ``x`` any; ``scale`` and ``offset`` broadcast against it. Codes keep the dtype of ``x``.
    """
    steps = x / scale
    if offset is not None:
        steps = steps - offset
    return steps.round_().clamp_(qmin, qmax)


def dequantize(codes: Tensor, scale: Tensor, offset: Tensor | None = None) -> Tensor:
    """Values ``scale * (codes + offset)``; shapes as in :func:`quantize`."""
    return codes * scale if offset is None else (codes + offset) * scale


class _FakeQuantize(torch.autograd.Function):
    """Quantize and dequantize in one node, so that only the unrounded codes are kept for backward.

    Gradients (LSQ, Esser et al. 2020, eq. 3; LSQ+ eq. 5 for the offset): to ``x`` straight through where no
    code is clipped, to ``scale`` the rounding error inside and the bound outside, to ``offset`` only where
    clipped, since inside the two occurrences of the offset cancel.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        offset: Tensor | None,
        qmin: int,
        qmax: int,
        scale_gradient: float,
    ) -> Tensor:
        steps = x / scale
        if offset is not None:
            steps.sub_(offset)
        ctx.save_for_backward(steps, scale, offset)
        ctx.bounds = (qmin, qmax)
        ctx.scale_gradient = scale_gradient
        codes = steps.round().clamp_(qmin, qmax)
        if offset is not None:
            codes.add_(offset)
        return codes.mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        steps, scale, offset = ctx.saved_tensors
        qmin, qmax = ctx.bounds
        inside = (steps >= qmin) & (steps <= qmax)
        to_x = gradient * inside if ctx.needs_input_grad[0] else None
        to_scale = to_offset = None
        if ctx.needs_input_grad[1]:
            codes = steps.round().clamp_(qmin, qmax)
            slope = codes.sub_(steps.mul(inside))
            if offset is not None:
                slope.add_(offset * ~inside)
            to_scale = slope.mul_(gradient).sum_to_size(scale.shape) * ctx.scale_gradient
        if offset is not None and ctx.needs_input_grad[2]:
            to_offset = (gradient * ~inside * scale).sum_to_size(offset.shape) * ctx.scale_gradient
        return to_x, to_scale, to_offset, None, None, None


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
        scale: positive, broadcasts against ``x``.
        qmin: smallest code.
        qmax: largest code.
        offset: in steps, broadcasts against ``x``; None for a symmetric quantizer.
        scale_gradient: LSQ's factor ``g`` on the gradients of scale and offset (Esser et al. 2020, sec. 2.2).

    Returns:
        The quantized values, shape and dtype of ``x``; computed in at least FP32, since bfloat16 cannot tell
        neighboring 8-bit codes apart.
    """
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    result: Tensor = _FakeQuantize.apply(  # type: ignore[no-untyped-call]
        wide,
        scale.to(wide.dtype),
        None if offset is None else offset.to(wide.dtype),
        qmin,
        qmax,
        scale_gradient,
    )
    return result.to(x.dtype)
