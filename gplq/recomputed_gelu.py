"""A GELU behind a quantized linear layer that computes its input anew in backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from gplq.quantized_linear import Source

__all__ = ['recomputed_gelu']


def recomputed_gelu(x: Tensor, source: Source, approximate: str) -> Tensor:
    """``gelu(x)``, values and gradients to the last bit, that keeps nothing of its own between forward and backward.

    Its input, four times as wide as a block, is the largest tensor that a block with quantized products would keep;
    the layer before it keeps the codes of a quarter of it.

    Args:
        x: output of a linear layer.
        source: what ``x`` was computed from.
        approximate: as in ``torch.nn.GELU``.

    Returns:
        Shape and dtype of ``x``.
    """
    y: Tensor = _RecomputedGELU.apply(x, source, approximate)  # type: ignore[no-untyped-call]
    return y


class _RecomputedGELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Source, approximate: str) -> Tensor:
        ctx.save_for_backward(*source.tensors)
        ctx.settings, ctx.approximate, ctx.shape = source.settings, approximate, x.shape
        return F.gelu(x, approximate=approximate)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *arguments: Tensor) -> tuple[Tensor | None, ...]:
        x = Source(*ctx.saved_tensors, *ctx.settings).output().view(ctx.shape)
        to_x = torch.ops.aten.gelu_backward(arguments[0], x, approximate=ctx.approximate)
        return to_x, None, None
