"""``nn.MultiheadAttention``, taken apart: the one module whose products no interception can see."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from gplq.layers.linear_map import LinearMap

__all__ = ['DecomposedMultiheadAttention']


class DecomposedMultiheadAttention(nn.MultiheadAttention):
    """The same function from three projections, two visible products and the output projection.

    Shapes and masks as in ``nn.MultiheadAttention``. Parameters keep their names; the three projections read
    ``in_proj_weight`` by rows, or ``q_proj_weight`` and its siblings where dimensions differ.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        batched = query.dim() == 3
        if not batched:
            query, key, value = query[:, None], key[:, None], value[:, None]
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        elif self.batch_first:
            query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        targets, batch, _ = query.shape
        q, k, v = self._project(query, key, value)
        if self.bias_k is not None and self.bias_v is not None:
            k = F.pad(k, (0, 0, 0, 0, 0, 1)) + F.pad(self.bias_k, (0, 0, 0, 0, k.shape[0], 0))
            v = F.pad(v, (0, 0, 0, 0, 0, 1)) + F.pad(self.bias_v, (0, 0, 0, 0, v.shape[0], 0))
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 0, 0, 1)), F.pad(v, (0, 0, 0, 0, 0, 1))
        q, k, v = (self._to_heads(x) for x in (q, k, v))
        scores = (q @ k.transpose(-2, -1)) * self.head_dim**-0.5
        mask = self._mask(scores, attn_mask, key_padding_mask)
        if mask is not None:
            scores = scores + mask
        attention = F.dropout(scores.softmax(dim=-1), self.dropout, self.training)
        y = (attention @ v).permute(2, 0, 1, 3).reshape(targets, batch, self.embed_dim)
        y = self.out_proj(y)
        weights = None
        if need_weights:
            weights = attention.mean(dim=1) if average_attn_weights else attention
            weights = weights if batched else weights[0]
        if not batched:
            return y[:, 0], weights
        return (y.transpose(0, 1) if self.batch_first else y), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self._qkv_same_embed_dim:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        # No class attributes of these names: they would hide the modules.
        maps: list[LinearMap | None] = [getattr(self, f'{kind}_map', None) for kind in ('query', 'key', 'value')]
        q, k, v = (
            F.linear(x, weight, bias) if a_map is None else a_map.run(F.linear, x, weight, bias)
            for x, weight, bias, a_map in zip((query, key, value), weights, biases, maps, strict=True)
        )
        return q, k, v

    def _to_heads(self, x: Tensor) -> Tensor:
        """``(n, batch, embed)`` -> ``(batch, heads, n, head)``."""
        return x.reshape(x.shape[0], x.shape[1], self.num_heads, self.head_dim).permute(1, 2, 0, 3)

    def _mask(self, scores: Tensor, mask: Tensor | None, padding: Tensor | None) -> Tensor | None:
        """Both masks as one additive tensor that broadcasts against ``(batch, heads, n, m)``."""
        total: Tensor | None = None
        extra = scores.shape[-1]
        for given in (mask, None if padding is None else padding[:, None, None, :]):
            if given is None:
                continue
            if given.dim() == 3:
                given = given.reshape(-1, self.num_heads, *given.shape[1:])
            given = F.pad(given, (0, extra - given.shape[-1]))
            if given.dtype == scores.dtype:
                additive = given
            elif given.is_floating_point():
                additive = given.to(scores.dtype)
            else:
                additive = scores.new_zeros(given.shape).masked_fill(given.bool(), float('-inf'))
            total = additive if total is None else total + additive
        return total
