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


def _steps(x: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
    """``x / scale - offset`` in memory of its own, in FP32 at least."""
    # Memory that is written for the first time costs more than the arithmetic: what can be is done in place.
    steps = x / scale if x.dtype == scale.dtype else x.to(scale.dtype).div_(scale)
    return steps if offset is None else steps.sub_(offset)


class _FakeQuantize(torch.autograd.Function):
    """Quantize and dequantize in one node that keeps nothing for backward but its input.

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
        ctx.save_for_backward(x, scale, offset)
        ctx.bounds = (qmin, qmax)
        ctx.scale_gradient = scale_gradient
        codes = _steps(x, scale, offset).round_().clamp_(qmin, qmax)
        if offset is not None:
            codes.add_(offset)
        return codes.mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, offset = ctx.saved_tensors
        steps = _steps(x, scale, offset)
        gradient = gradients[0].to(steps.dtype)
        qmin, qmax = ctx.bounds
        # One pass instead of two comparisons, their conjunction and a product: this is on every training step.
        to_x = torch.ops.aten.hardtanh_backward(gradient, steps, qmin, qmax)
        to_scale = to_offset = None
        if ctx.needs_input_grad[1]:
            # code - inside * steps, times the gradient, where inside * gradient is what x was given.
            slope = steps.round().clamp_(qmin, qmax)
            if offset is not None:
                slope.add_(offset)
            slope.mul_(gradient).addcmul_(to_x, steps, value=-1)
            if offset is not None:
                slope.addcmul_(to_x, offset.expand_as(to_x), value=-1)
            to_scale = slope.sum_to_size(scale.shape) * ctx.scale_gradient
        if offset is not None and ctx.needs_input_grad[2]:
            to_offset = ((gradient - to_x) * scale).sum_to_size(offset.shape) * ctx.scale_gradient
        return to_x.to(x.dtype), to_scale, to_offset, None, None, None


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
    result: Tensor = _FakeQuantize.apply(  # type: ignore[no-untyped-call]
        x, scale, offset, qmin, qmax, scale_gradient
    )
    return result
