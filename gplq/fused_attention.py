"""Softmax attention with a quantized attention map, a few heads at a time, nothing of it kept for backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ['quantized_attention']

# Elements of the attention map that are worked on at once: small enough to stay in a CPU's cache, and many enough
# small heads to fill a GPU.
_CHUNK = {'cpu': 1 << 20, 'cuda': 1 << 26}


def quantized_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: Tensor,
    qmin: int,
    qmax: int,
    scale_gradient: float = 1.0,
) -> Tensor:
    """``fake_quantize(softmax(query @ key^T + mask), scale) @ value``, values and gradients as if written out.

    The map of n x m values a head is by far the largest tensor of an attention, and written out it is kept several
    times over. Here it is made anew in backward, as FlashAttention does (Dao et al. 2022, sec. 3.1), with LSQ's
    gradient for its scale.

    Args:
        query: ``(..., n, d)``, already multiplied by the softmax's temperature.
        key: ``(..., m, d)``.
        value: ``(..., m, e)``.
        mask: additive, broadcasts against ``(..., n, m)``.
        scale: of the attention map, ``(..., 1, 1)`` once broadcast against the leading axes.
        qmin: smallest code.
        qmax: largest code.
        scale_gradient: LSQ's factor.

    Returns:
        ``(..., n, e)``.
    """
    device = query.device.type
    if torch.is_autocast_enabled(device):
        kind = torch.get_autocast_dtype(device)
        query, key, value = query.to(kind), key.to(kind), value.to(kind)
    # Heads of the query may share a key and a value.
    lead = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2])  # type: ignore[no-untyped-call]
    query, key, value = (x.expand(*lead, *x.shape[-2:]) for x in (query, key, value))
    groups = lead.numel()
    scales = scale.float().expand(*lead, 1, 1).reshape(groups, 1, 1)
    flat_mask = index = None
    if mask is not None:
        mask = mask.expand(*mask.shape[:-2], query.shape[-2], key.shape[-2])
        heads = mask.shape[:-2]
        flat_mask = mask.reshape(-1, *mask.shape[-2:])
        # Which mask belongs to which head, so that one mask for all images is not copied for each.
        index = torch.arange(heads.numel(), device=mask.device).reshape(heads).expand(lead).reshape(groups)
    y: Tensor = _QuantizedAttention.apply(  # type: ignore[no-untyped-call]
        query.reshape(groups, *query.shape[-2:]),
        key.reshape(groups, *key.shape[-2:]),
        value.reshape(groups, *value.shape[-2:]),
        flat_mask,
        index,
        scales,
        (qmin, qmax),
        scale_gradient,
    )
    return y.reshape(*lead, *y.shape[-2:])


class _QuantizedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        index: Tensor | None,
        scale: Tensor,
        bounds: tuple[int, int],
        scale_gradient: float,
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, mask, index, scale)
        ctx.bounds, ctx.scale_gradient = bounds, scale_gradient
        y = value.new_empty(*query.shape[:-1], value.shape[-1])
        with torch.autocast(query.device.type, enabled=False):
            for part in _parts(query, key):
                attention = _attention(query[part], key[part], _masks(mask, index, part))
                codes = attention.div_(scale[part]).round_().clamp_(*bounds)
                torch.bmm(codes.mul_(scale[part]).to(value.dtype), value[part], out=y[part])
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask, index, scale = ctx.saved_tensors
        gradient = gradients[0].to(value.dtype)
        to_query, to_key, to_value = (torch.empty_like(x) for x in (query, key, value))
        to_mask = torch.zeros_like(mask) if ctx.needs_input_grad[3] else None
        to_scale = torch.zeros_like(scale)
        with torch.autocast(query.device.type, enabled=False):
            for part in _parts(query, key):
                attention = _attention(query[part], key[part], _masks(mask, index, part))
                steps = attention / scale[part]
                codes = steps.round().clamp_(*ctx.bounds)
                incoming = torch.bmm(gradient[part], value[part].transpose(1, 2)).float()
                passed = torch.ops.aten.hardtanh_backward(incoming, steps, *ctx.bounds)
                slope = incoming.mul_(codes).addcmul_(passed, steps, value=-1)
                to_scale[part] = slope.sum(dim=(1, 2), keepdim=True)
                restored = codes.mul_(scale[part]).to(value.dtype)
                torch.bmm(restored.transpose(1, 2), gradient[part], out=to_value[part])
                scores = torch._softmax_backward_data(passed, attention, -1, torch.float32)
                if to_mask is not None:
                    to_mask.index_add_(0, index[part], scores.to(to_mask.dtype))
                scores = scores.to(query.dtype)
                torch.bmm(scores, key[part], out=to_query[part])
                torch.bmm(scores.transpose(1, 2), query[part], out=to_key[part])
        return to_query, to_key, to_value, to_mask, None, to_scale * ctx.scale_gradient, None, None


def _parts(query: Tensor, key: Tensor) -> list[slice]:
    """Slices of heads whose attention maps are worked on together."""
    each = max(1, query.shape[1] * key.shape[1])
    count = max(1, _CHUNK.get(query.device.type, 1 << 22) // each)
    return [slice(start, start + count) for start in range(0, query.shape[0], count)]


def _masks(mask: Tensor | None, index: Tensor | None, part: slice) -> Tensor | None:
    return None if mask is None or index is None else mask[index[part]]


def _attention(query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
    """The FP32 attention maps ``(heads, n, m)`` of some heads."""
    scores = torch.bmm(query, key.transpose(1, 2)).float()
    if mask is None:
        return torch.softmax(scores, dim=-1)
    scores = scores.add_(mask)
    nothing = scores.isneginf().all(dim=-1, keepdim=True)
    return torch.softmax(scores, dim=-1).masked_fill_(nothing, 0.0)
