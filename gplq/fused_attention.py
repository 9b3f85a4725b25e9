"""Softmax attention on quantized operands, a few heads at a time, that keeps codes and rounding errors for backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gplq.autocast import product_dtype
from gplq.grid import Grid
from gplq.kept import Kept, gradients, keep, restore
from gplq.row_quantizer import row_units

__all__ = ['flat_heads', 'parts_of_heads', 'quantized_attention']

# Elements of the attention map that are worked on at once: small enough to stay in a CPU's cache, and many enough
# small heads to fill a GPU.
_CHUNK = {'cpu': 1 << 20, 'cuda': 1 << 26}


def quantized_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    grids: tuple[Grid, Grid, Grid, Grid],
    rows: bool = False,
) -> Tensor:
    """Softmax attention with all four operands of its two products quantized, as if written out.

    The map of n x m values a head is by far the largest tensor of an attention, and written out it is kept several
    times over. Here it is made anew in backward, as FlashAttention does (Dao et al. 2022, sec. 3.1), and of query, key
    and value their codes are kept. Gradients of the scales are LSQ's, for query, key and value from rounding errors in
    8 bit.

    Args:
        query: ``(..., n, d)``, already multiplied by the softmax's temperature.
        key: ``(..., m, d)``.
        value: ``(..., m, e)``.
        mask: additive, broadcasts against ``(..., n, m)``.
        grids: of query, key, value and attention map, without offsets; scales ``(..., 1, 1)`` once broadcast against
            the leading axes, the value's ``(..., 1, e)``.
        rows: whether the map's scale is in units of each row's largest value, see :mod:`gplq.row_quantizer`.

    Returns:
        ``(..., n, e)``.
    """
    # Heads of the query may share a key and a value.
    lead = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2])  # type: ignore[no-untyped-call]
    groups = lead.numel()
    operands = [flat_heads(x, lead) for x in (query, key, value)]
    # Columns of a product may have scales of their own, its rows never have.
    scales = [flat_heads(grid.scale.reshape(*grid.scale.shape[:-2], 1, -1), lead) for grid in grids]
    flat_mask = index = None
    if mask is not None:
        mask = mask.expand(*mask.shape[:-2], query.shape[-2], key.shape[-2])
        heads = mask.shape[:-2]
        flat_mask = mask.reshape(heads.numel(), *mask.shape[-2:])
        # Which mask belongs to which head, so that one mask for all images is not copied for each.
        index = torch.arange(heads.numel(), device=mask.device).reshape(heads).expand(lead).reshape(groups)
    y: Tensor = _QuantizedAttention.apply(  # type: ignore[no-untyped-call]
        *operands,
        *scales,
        flat_mask,
        index,
        tuple((grid.qmin, grid.qmax, grid.factor) for grid in grids),
        product_dtype(value),
        rows,
    )
    return y.reshape(*lead, *y.shape[-2:])


class _QuantizedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        query_scale: Tensor,
        key_scale: Tensor,
        value_scale: Tensor,
        scale: Tensor,
        mask: Tensor | None,
        index: Tensor | None,
        grids: tuple[tuple[int, int, float], ...],
        dtype: torch.dtype,
        rows: bool,
    ) -> Tensor:
        scales = (query_scale, key_scale, value_scale)
        kept: list[Tensor] = []
        restored = []
        for x, own, (qmin, qmax, _) in zip((query, key, value), scales, grids, strict=False):
            of_x, values = keep(x, Grid(own, qmin, qmax), dtype)
            kept.extend(of_x)
            restored.append(values)
        ctx.save_for_backward(*kept, *scales, scale, mask, index)
        ctx.grids, ctx.dtype, ctx.given, ctx.rows = grids, dtype, (query.dtype, key.dtype, value.dtype), rows
        query, key, value = restored
        bounds = grids[3][:2]
        y = value.new_empty(*query.shape[:-1], value.shape[-1])
        with torch.autocast(query.device.type, enabled=False):
            blocked = _blocked(mask)
            for part in parts_of_heads(query, key):
                seen = _picked(mask, index, part), _picked(blocked, index, part)
                attention = _attention(query[part], key[part], *seen)
                of_map = scale[part] * (row_units(attention) if rows else 1.0)
                codes = attention.div_(of_map).round_().clamp_(*bounds)
                torch.ops.aten.bmm(codes.mul_(of_map).to(dtype), value[part], out=y[part])
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *arguments: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        kept = [Kept(*saved[number : number + 2]) for number in (0, 2, 4)]
        scales, (scale, mask, index) = saved[6:9], saved[9:]
        gradient = arguments[0].to(ctx.dtype)
        query, key, value = (
            restore(k, Grid(own, qmin, qmax), ctx.dtype)
            for k, own, (qmin, qmax, _) in zip(kept, scales, ctx.grids, strict=False)
        )
        incoming = [torch.empty_like(x) for x in (query, key, value)]
        to_query, to_key, to_value = incoming
        to_mask = torch.zeros_like(mask) if ctx.needs_input_grad[7] else None
        to_scale = torch.zeros_like(scale)
        bounds, factor = ctx.grids[3][:2], ctx.grids[3][2]
        with torch.autocast(query.device.type, enabled=False):
            blocked = _blocked(mask)
            for part in parts_of_heads(query, key):
                seen = _picked(mask, index, part), _picked(blocked, index, part)
                attention = _attention(query[part], key[part], *seen)
                units = row_units(attention) if ctx.rows else 1.0
                of_map = scale[part] * units
                steps = attention / of_map
                codes = steps.round().clamp_(*bounds)
                at_map = torch.ops.aten.bmm(gradient[part], value[part].transpose(1, 2)).to(scale.dtype)
                passed = torch.ops.aten.hardtanh_backward(at_map, steps, *bounds)
                slope = at_map.mul_(codes).addcmul_(passed, steps, value=-1)
                to_scale[part] = slope.sum(dim=2, keepdim=True).mul_(units).sum(dim=1, keepdim=True)
                restored = codes.mul_(of_map).to(ctx.dtype)
                torch.ops.aten.bmm(restored.transpose(1, 2), gradient[part], out=to_value[part])
                scores = torch._softmax_backward_data(passed, attention, -1, attention.dtype)
                if to_mask is not None:
                    to_mask.index_add_(0, index[part], scores.to(to_mask.dtype))
                scores = scores.to(ctx.dtype)
                torch.ops.aten.bmm(scores, key[part], out=to_query[part])
                torch.ops.aten.bmm(scores.transpose(1, 2), query[part], out=to_key[part])
            del query, key, value
            to_operands, to_scales = [], []
            for k, own, given, (qmin, qmax, own_factor) in zip(kept, scales, ctx.given, ctx.grids, strict=False):
                to_x, to_own, _ = gradients(k, incoming.pop(0), Grid(own, qmin, qmax, None, own_factor), given)
                to_operands.append(to_x)
                to_scales.append(to_own)
        return *to_operands, *to_scales, to_scale * factor, to_mask, None, None, None, None


def flat_heads(x: Tensor, lead: torch.Size) -> Tensor:
    """``(..., n, d)`` as ``(heads, n, d)``, its leading axes broadcast to ``lead``."""
    return x.expand(*lead, *x.shape[-2:]).reshape(lead.numel(), *x.shape[-2:])


def parts_of_heads(query: Tensor, key: Tensor) -> list[slice]:
    """Slices of heads whose attention maps are worked on together; shapes ``(heads, n, d)`` and ``(heads, m, d)``."""
    each = max(1, query.shape[1] * key.shape[1])
    count = max(1, _CHUNK.get(query.device.type, 1 << 22) // each)
    return [slice(start, start + count) for start in range(0, query.shape[0], count)]


def _blocked(mask: Tensor | None) -> Tensor | None:
    """Which queries may look at nothing, ``(masks, n, 1)``: they get nothing, as from torch's own kernels."""
    return None if mask is None else mask.isneginf().all(dim=-1, keepdim=True)


def _picked(masks: Tensor | None, index: Tensor | None, part: slice) -> Tensor | None:
    return None if masks is None or index is None else masks[index[part]]


def _attention(query: Tensor, key: Tensor, mask: Tensor | None, blocked: Tensor | None) -> Tensor:
    """The FP32 attention maps ``(heads, n, m)`` of some heads."""
    # ATen's own: a compiler traces this, and must not meet the modes that look for a model's products.
    scores = torch.ops.aten.bmm(query, key.transpose(1, 2))
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if mask is None or blocked is None:
        return torch.softmax(scores, dim=-1)
    return torch.softmax(scores.add_(mask), dim=-1).masked_fill_(blocked, 0.0)
