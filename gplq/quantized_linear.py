"""A linear layer of a quantized input that keeps codes for backward, not floats."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakTensorKeyDictionary

from gplq.autocast import product_dtype
from gplq.grid import Grid
from gplq.kept import Kept, gradients, keep, restore

__all__ = ['Source', 'quantized_linear', 'source_of']


class Source(NamedTuple):
    """What the output of a linear layer was computed from, all of which the layer keeps for its own backward."""

    codes: Tensor
    errors: Tensor
    weight: Tensor
    bias: Tensor | None
    scale: Tensor
    offset: Tensor | None
    bounds: tuple[int, int]
    dtype: torch.dtype

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """What ``save_for_backward`` takes, first among the fields."""
        return self[:6]

    @property
    def settings(self) -> tuple[tuple[int, int], torch.dtype]:
        """The other fields."""
        return self.bounds, self.dtype

    def output(self) -> Tensor:
        """The output ``(n, rows)``, to the last bit."""
        values = restore(Kept(self.codes, self.errors), Grid(self.scale, *self.bounds, self.offset), self.dtype)
        return _product(values, self.weight, self.bias, self.dtype)


# Beside the tensors and not in their attributes, which are saved with them.
_SOURCES: MutableMapping[Tensor, tuple[Source, int]] = WeakTensorKeyDictionary()


def source_of(y: Tensor) -> Source | None:
    """How :func:`quantized_linear` computed ``y``; None if it did not, or ``y`` was changed since."""
    if torch.compiler.is_compiling():
        return None
    source, version = _SOURCES.get(y, (None, 0))
    return source if source is not None and version == y._version else None


def quantized_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grid: Grid,
) -> Tensor:
    """``linear(fake_quantize(x), weight, bias)``, values and gradients as if written out.

    Between forward and backward it keeps 1.5 bytes a value of ``x`` at 4 bits, where the two operations keep the
    quantized values as well. Only the scale's gradient depends on the rounding error in 8 bit; those of input and
    weight are exact.

    Args:
        x: ``(..., columns)``.
        weight: ``(rows, columns)``.
        bias: ``(rows,)`` or None.
        grid: of ``x``; scale and offset have one value, or one a column.

    Returns:
        ``(..., rows)``.
    """
    bounds, dtype = (grid.qmin, grid.qmax), product_dtype(x)
    # A matrix, so that the result is no view made inside: callers may add to it in place.
    y, codes, errors = _QuantizedLinear.apply(  # type: ignore[no-untyped-call]
        x.reshape(-1, x.shape[-1]),
        weight,
        bias,
        grid.scale,
        grid.offset,
        bounds,
        grid.factor,
        dtype,
    )
    result: Tensor = y.reshape(*x.shape[:-1], weight.shape[0])
    if result.requires_grad and not torch.compiler.is_compiling():
        source = Source(codes, errors, weight, bias, grid.scale, grid.offset, bounds, dtype)
        _SOURCES[result] = source, result._version
    return result


def _product(values: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    with torch.autocast(values.device.type, enabled=False):
        # ATen's own: a compiler traces this, and must not meet the modes that look for a model's products.
        y: Tensor = torch.ops.aten.linear(values, weight.to(dtype), None if bias is None else bias.to(dtype))
        return y


class _QuantizedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: Tensor,
        offset: Tensor | None,
        bounds: tuple[int, int],
        factor: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:
        kept, values = keep(x, Grid(scale, bounds[0], bounds[1], offset), dtype)
        ctx.save_for_backward(*kept, weight, scale, offset)
        ctx.bounds, ctx.factor, ctx.dtype, ctx.given, ctx.has_bias = bounds, factor, dtype, x.dtype, bias is not None
        ctx.mark_non_differentiable(*kept)
        # No zeros for what has no gradient.
        ctx.set_materialize_grads(False)
        return _product(values, weight, bias, dtype), *kept

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *arguments: Tensor) -> tuple[Tensor | None, ...]:
        codes, errors, weight, scale, offset = ctx.saved_tensors
        kept, grid = Kept(codes, errors), Grid(scale, ctx.bounds[0], ctx.bounds[1], offset, ctx.factor)
        gradient = arguments[0].to(ctx.dtype)
        to_x = to_weight = to_bias = to_scale = to_offset = None
        with torch.autocast(gradient.device.type, enabled=False):
            if ctx.needs_input_grad[1]:
                to_weight = torch.ops.aten.mm(gradient.t(), restore(kept, grid, ctx.dtype)).to(weight.dtype)
            if ctx.has_bias and ctx.needs_input_grad[2]:
                to_bias = gradient.sum(0).to(weight.dtype)
            if any(ctx.needs_input_grad[number] for number in (0, 3, 4)):
                incoming = torch.ops.aten.mm(gradient, weight.to(ctx.dtype))
                to_x, to_scale, to_offset = gradients(kept, incoming, grid, ctx.given)
        return to_x, to_weight, to_bias, to_scale, to_offset, None, None, None
