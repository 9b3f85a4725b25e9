"""Attention products, quantized where they happen: a function mode owned by the module that computes them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from gplq.errors import ProductError
from gplq.fused_attention import quantized_attention
from gplq.layers.linear import QuantizedLinear
from gplq.quantized_matmul import quantized_matmul
from gplq.quantizer import Quantizer
from gplq.row_quantizer import RowQuantizer

__all__ = ['ProductOwner', 'QuantizedProduct', 'product_operands', 'scaled_dot_product_parts', 'unowned_products']

_MATMULS = frozenset(
    {torch.matmul, torch.linalg.matmul, torch.bmm, torch.mm} | {Tensor.matmul, Tensor.__matmul__, Tensor.bmm, Tensor.mm}
)
# Elements of an attention map that are observed at once.
_OBSERVED = 1 << 22


def product_operands(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor] | None:
    """The operands of a call that multiplies two tensors which are no parameters, None for any other call.

    Such calls are matrix products and einsums of two operands. One that writes into a tensor it is given (``out``) is
    left as it is: compiled code computes so.
    """
    if kwargs.get('out') is not None:
        return None
    if func in _MATMULS:
        operands = (*args, *(kwargs[name] for name in ('input', 'other', 'mat2') if name in kwargs))
    elif func is torch.einsum:
        operands = args[1:]
        if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
            operands = tuple(operands[0])
    else:
        return None
    if len(operands) != 2 or any(not isinstance(x, Tensor) or isinstance(x, nn.Parameter) for x in operands):
        return None
    return operands[0], operands[1]


def scaled_dot_product_parts(
    query_key: Callable[[Tensor, Tensor], Tensor],
    attention_value: Callable[[Tensor, Tensor], Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``F.scaled_dot_product_attention`` with its two products given from outside.

    Shapes as there: query ``(..., n, d)``, key ``(..., m, d)``, value ``(..., m, e)`` -> ``(..., n, e)``.
    """
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], dim=-3)
    # On the query, which is smaller than the scores; a quantizer's scale absorbs it.
    query = _tempered(query, scale)
    scores = query_key(query, key.transpose(-2, -1))
    if is_causal:
        causal = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~causal, float('-inf'))
    blocked = None
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, float('-inf'))
            blocked = ~attn_mask.any(dim=-1, keepdim=True)
        else:
            scores = scores + attn_mask
            blocked = attn_mask.isneginf().all(dim=-1, keepdim=True)
    attention = F.softmax(scores, dim=-1)
    if blocked is not None:
        # A query that may look at nothing gets nothing, as from the fused kernel.
        attention = attention.masked_fill(blocked, 0.0)
    if dropout_p > 0:
        attention = F.dropout(attention, dropout_p)
    return attention_value(attention, value)


def _tempered(query: Tensor, scale: float | None) -> Tensor:
    """The query times the softmax's temperature, by default ``1 / sqrt(d)``."""
    return query * (query.shape[-1] ** -0.5 if scale is None else scale)


class QuantizedProduct(nn.Module):
    """Quantizers of the two operands of one product; each is a child named for its site.

    Args:
        index: which of the owner's products this is, in the order of its forward.
        sites: names of left and right operand, such as ``('query', 'key')``.
        operands: their quantizers.
    """

    def __init__(self, index: int, sites: tuple[str, str], operands: tuple[Quantizer, Quantizer]) -> None:
        super().__init__()
        self.index = index
        self.sites = sites
        for site, quantizer in zip(sites, operands, strict=True):
            self.add_module(site, quantizer)
        # Whether the model computes it by an einsum, whose operands may lie in any order.
        self.einsum = False
        # Set while a stage looks on; sees both operands before they are quantized and the product, the latter with its
        # gradient where there is one.
        self.watcher: Callable[[Tensor, Tensor, Tensor], None] | None = None

    @property
    def operands(self) -> tuple[Quantizer, Quantizer]:
        """Left and right quantizer."""
        left, right = (self.get_submodule(site) for site in self.sites)
        assert isinstance(left, Quantizer) and isinstance(right, Quantizer)
        return left, right

    @property
    def active(self) -> bool:
        """Whether the operands must be seen: a quantizer is enabled or observing."""
        return self.watcher is not None or any(q.enabled or q.observer is not None for q in self.operands)

    @property
    def settled(self) -> bool:
        """Whether both operands are quantized and nobody looks on."""
        return self.watcher is None and all(q.settled for q in self.operands)

    @property
    def observing(self) -> bool:
        """Whether both operands are observed, and so left as they are, and nobody looks on."""
        return self.watcher is None and all(q.observer is not None for q in self.operands)

    def forward(self, left: Tensor, right: Tensor, multiply: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        quantize_left, quantize_right = self.operands
        # Leading axes that must be broadcast are left to the general operations.
        alike = min(left.dim(), right.dim()) >= 2 and left.shape[:-2] == right.shape[:-2]
        if alike and multiply is torch.matmul and self.settled:
            return quantized_matmul(left, right, (quantize_left.grid(left), quantize_right.grid(right)))
        y = multiply(quantize_left(left), quantize_right(right))
        if self.watcher is not None:
            self.watcher(left.detach(), right.detach(), y)
        return y


class ProductOwner(nn.Module):
    """Put in front of a module whose own forward multiplies activations, or calls ``F.linear`` on a child's weight.

    While its forward runs, a mode routes those calls through the quantizers. The mode refers to the module that
    runs, never to the one that was prepared: deep copies keep their own scales.
    """

    quantized_products: nn.ModuleList
    product_calls: int
    functional_linears: tuple[str, ...]
    owner_name: str

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        mode = _ProductMode(self)
        with mode:
            y = super().forward(*args, **kwargs)
        if mode.calls != self.product_calls:
            raise ProductError(
                f'{self.owner_name or "the model"}: {mode.calls} matrix products were computed where '
                f'{self.product_calls} were found in preparation; its control flow depends on the input. '
                f"Leave it out with skip=('{self.owner_name}',)"
            )
        return y


class _Running(threading.local):
    """The modes whose forward is running in a thread, innermost last: a product belongs to the innermost alone."""

    def __init__(self) -> None:
        self.modes: list[_ProductMode | None] = []


_RUNNING = _Running()


@contextmanager
def unowned_products() -> Iterator[None]:
    """Products computed within belong to no module, even where this is reached from a module's forward."""
    _RUNNING.modes.append(None)
    try:
        yield
    finally:
        _RUNNING.modes.pop()


class _ProductMode(TorchFunctionMode):
    def __init__(self, owner: ProductOwner) -> None:
        super().__init__()
        self.owner = owner
        self.calls = 0
        self.gradients = torch.is_grad_enabled()

    def __enter__(self) -> _ProductMode:
        _RUNNING.modes.append(self)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        _RUNNING.modes.pop()
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if _RUNNING.modes[-1] is self:
            if func is F.linear and self.owner.functional_linears:
                self._check_gradients()
                return self._linear(*args, **kwargs)
            if func is F.scaled_dot_product_attention:
                return self._attention(*args, **kwargs)
            operands = product_operands(func, args, kwargs)
            if operands is not None:
                return self._product(func, args, kwargs, operands)
        return func(*args, **kwargs)

    def _check_gradients(self) -> None:
        """Recomputation in backward runs outside of this mode."""
        if self.owner.training and self.gradients and not torch.is_grad_enabled():
            raise ProductError(
                f'{self.owner.owner_name or "the model"}: it computes products without gradients in training, as '
                'activation checkpointing inside of a module does, and would compute them unquantized in backward; '
                f"checkpoint the whole module or block, or leave it out with skip=('{self.owner.owner_name}',)"
            )

    def _next(self) -> QuantizedProduct | None:
        self._check_gradients()
        index = self.calls
        self.calls += 1
        for product in self.owner.quantized_products:
            assert isinstance(product, QuantizedProduct)
            if product.index == index and product.active:
                return product
        return None

    def _product(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], operands: tuple[Tensor, Tensor]
    ) -> Any:
        product = self._next()
        if product is None:
            return func(*args, **kwargs)
        product.einsum = func is torch.einsum
        if product.einsum:
            return product(*operands, lambda left, right: torch.einsum(args[0], left, right))
        return product(*operands, torch.matmul)

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        query_key, attention_value = self._next(), self._next()
        additive = attn_mask is None or attn_mask.is_floating_point()
        if additive and dropout_p == 0 and not is_causal and not enable_gqa:
            active = [product for product in (query_key, attention_value) if product is not None]
            if query_key is not None and attention_value is not None and all(p.settled for p in active):
                return _fused(query_key, attention_value, _tempered(query, scale), key, value, attn_mask)
            if active and all(product.observing for product in active):
                return _observed(query_key, attention_value, _tempered(query, scale), key, value, attn_mask)
        options: dict[str, Any] = dict(
            attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
        )
        if query_key is None and attention_value is None:
            return F.scaled_dot_product_attention(query, key, value, **options)
        return scaled_dot_product_parts(
            _multiplier(query_key), _multiplier(attention_value), query, key, value, **options
        )

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        for name in self.owner.functional_linears:
            layer = self.owner.get_submodule(name)
            if isinstance(layer, QuantizedLinear) and layer.weight is weight:
                return layer.apply_functional(input, bias)
        return F.linear(input, weight, bias)


def _multiplier(product: QuantizedProduct | None) -> Callable[[Tensor, Tensor], Tensor]:
    if product is None:
        return torch.matmul
    return lambda left, right: product(left, right, torch.matmul)


def _observed(
    query_key: QuantizedProduct | None,
    attention_value: QuantizedProduct | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
) -> Tensor:
    """A softmax of a tempered query, an additive mask at most, whose operands are observed, the map in parts.

    Written out whole, the map of a large image takes more memory than all that training keeps.
    """
    if query_key is not None:
        see_query, see_key = query_key.operands
        see_query(query)
        see_key(key.transpose(-2, -1))
    see_map: nn.Module = nn.Identity()
    if attention_value is not None:
        see_map, see_value = attention_value.operands
        see_value(value)
    lead = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2])  # type: ignore[no-untyped-call]
    tokens = query.shape[-2]
    # Even parts, since an observer samples as much of each.
    parts = max(1, min(tokens, -(-tokens * lead.numel() * key.shape[-2] // _OBSERVED)))
    masks: Sequence[Tensor | None] = [mask] * parts
    if mask is not None and mask.shape[-2] > 1:
        masks = torch.tensor_split(mask, parts, dim=-2)
    outputs = [
        scaled_dot_product_parts(
            torch.matmul, lambda attention, value: see_map(attention) @ value, rows, key, value, masked, scale=1.0
        )
        for rows, masked in zip(torch.tensor_split(query, parts, dim=-2), masks, strict=True)
    ]
    return torch.cat(outputs, dim=-2)


def _fused(
    query_key: QuantizedProduct,
    attention_value: QuantizedProduct,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
) -> Tensor:
    """A softmax of a tempered query, an additive mask at most, both of its products settled."""
    quantize_query, quantize_key = query_key.operands
    quantize_map, quantize_value = attention_value.operands
    return quantized_attention(
        query,
        key,
        value,
        mask,
        (
            quantize_query.grid(query),
            quantize_key.grid(key),
            quantize_value.grid(value),
            quantize_map.grid_over(len(query)),
        ),
        rows=isinstance(quantize_map, RowQuantizer),
    )
