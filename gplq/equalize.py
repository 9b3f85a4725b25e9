"""Even out query and key channels in the weights, where nothing else reads them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gplq.batches import Forward, bounded
from gplq.distributed import maximum, total
from gplq.functional import dequantize, quantize
from gplq.layers import QuantizedLinear
from gplq.observers import MSEObserver
from gplq.products import QuantizedProduct
from gplq.quantizer import Quantizer
from gplq.record import product_of, record_of

__all__ = ['equalize_queries_and_keys']

# Enough to see every channel's range; the exactness test does not depend on it.
_SAMPLES = 16


@dataclass
class _Seen:
    """One call of an attention module and the operands of its query-key product."""

    arguments: tuple[Any, ...] = ()
    keywords: dict[str, Any] = field(default_factory=dict)
    query: Tensor = field(default_factory=lambda: torch.empty(0))
    key: Tensor = field(default_factory=lambda: torch.empty(0))


@torch.no_grad()
def equalize_queries_and_keys(model: nn.Module, batches: Iterable[Any], forward: Forward) -> int:
    """Multiply query channel c by ``a_c`` and key channel c by ``1 / a_c``, in the rows that make them.

    One scale a head serves all its channels, so channels of very different size waste codes. The product does
    not change, but only where query and key come straight from Linear rows and nothing else reads them: with
    relative positions, a norm or a rotary embedding between, scaling is wrong. Both are tried, not assumed:
    rows are found by sending row numbers through the module, and the module's output must stay the same.
    A change is kept where it lowers the error of the quantized product.

    Returns:
        How many attention modules were changed.
    """
    owners = {
        p.owner: p.index for p in record_of(model).plan.products if (p.left.site, p.right.site) == ('query', 'key')
    }
    seen = _watch(model, owners, batches, forward)
    return sum(_equalize(model.get_submodule(name), owners[name], call) for name, call in seen.items())


def _watch(model: nn.Module, owners: dict[str, int], batches: Iterable[Any], forward: Forward) -> dict[str, _Seen]:
    """The last call of every owner in a few calibration batches."""
    seen = {name: _Seen() for name in owners}
    handles = []
    for name, index in owners.items():
        owner = model.get_submodule(name)
        handles.append(owner.register_forward_pre_hook(_Arguments(seen[name]), with_kwargs=True))
        product_of(owner, index).watcher = _Operands(seen[name])
    try:
        for batch in itertools.islice(bounded(batches, _SAMPLES), _SAMPLES):
            forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
        for name, index in owners.items():
            product_of(model.get_submodule(name), index).watcher = None
    return {name: call for name, call in seen.items() if call.query.numel()}


class _Arguments:
    def __init__(self, seen: _Seen) -> None:
        self.seen = seen

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.seen.arguments, self.seen.keywords = args, kwargs


class _Operands:
    def __init__(self, seen: _Seen) -> None:
        self.seen = seen

    def __call__(self, query: Tensor, key: Tensor, product: Tensor) -> None:
        self.seen.query, self.seen.key = query, key.transpose(-2, -1)


class _RowNumbers:
    """Replaces a Linear's output by the numbers of its rows, counted on from ``first``."""

    def __init__(self, first: int) -> None:
        self.first = first

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        rows = torch.arange(self.first, self.first + output.shape[-1], dtype=output.dtype, device=output.device)
        return rows.expand(output.shape).clone()


def _equalize(owner: nn.Module, index: int, seen: _Seen) -> bool:
    product = product_of(owner, index)
    rows = _rows(owner, product, seen)
    if rows is None:
        return False
    layers, query_rows, key_rows = rows
    quantizers = product.operands
    largest_query = maximum(_largest(quantizers[0], seen.query))
    largest_key = maximum(_largest(quantizers[1], seen.key))
    if not largest_query.shape == query_rows.shape == largest_key.shape == key_rows.shape:
        return False
    factor = (largest_key / largest_query).sqrt()
    factor = torch.where(factor.isfinite() & (factor > 0), factor, torch.ones_like(factor))
    before = _error(quantizers, seen.query, seen.key)
    after = _error(quantizers, *_scaled(quantizers[0], seen, factor))
    if float(total(after - before)) >= 0:
        return False
    expected = _first(owner(*seen.arguments, **seen.keywords))
    kept = [(layer.weight.clone(), None if layer.bias is None else layer.bias.clone()) for layer in layers]
    _scale_rows(layers, query_rows, factor)
    _scale_rows(layers, key_rows, 1 / factor)
    found = _first(owner(*seen.arguments, **seen.keywords))
    if float(maximum((found - expected).abs().max() - 1e-4 * expected.abs().max())) <= 0:
        return True
    for layer, (weight, bias) in zip(layers, kept, strict=True):
        layer.weight.copy_(weight)
        if layer.bias is not None and bias is not None:
            layer.bias.copy_(bias)
    return False


def _rows(
    owner: nn.Module, product: QuantizedProduct, seen: _Seen
) -> tuple[list[QuantizedLinear], Tensor, Tensor] | None:
    """The Linears in question and, as ``(heads, 1, channels)``, the row that each query and key channel is."""
    layers = [child for child in owner.children() if isinstance(child, QuantizedLinear)]
    if not layers:
        return None
    firsts = list(itertools.accumulate((layer.out_features for layer in layers), initial=1))
    # Counted from 1, so that a factor on the query (1 / sqrt(d)) shows in every number.
    handles = [layer.register_forward_hook(_RowNumbers(first)) for layer, first in zip(layers, firsts, strict=False)]
    numbers = _Seen()
    kept, product.watcher = product.watcher, _Operands(numbers)
    try:
        owner(*seen.arguments, **seen.keywords)
    finally:
        product.watcher = kept
        for handle in handles:
            handle.remove()
    quantizers = product.operands
    query = _constant(quantizers[0], numbers.query, firsts[-1])
    key = _constant(quantizers[1], numbers.key, firsts[-1])
    return None if query is None or key is None else (layers, query, key)


def _constant(quantizer: Quantizer, numbers: Tensor, end: int) -> Tensor | None:
    """Row numbers ``(heads, 1, channels)``, None if they differ between tokens or are no plain row numbers."""
    numbers = quantizer.split_heads(numbers).double()
    if numbers.dim() != 4:
        return None
    flat = numbers.permute(1, 3, 0, 2).reshape(numbers.shape[1], 1, numbers.shape[3], -1)
    if float((flat.amax(-1) - flat.amin(-1)).abs().max()) > 1e-6:
        return None
    rows = flat[..., 0]
    # A constant factor turns consecutive numbers into an even ladder; its step is the factor.
    step = (rows[..., 1:] - rows[..., :-1]).median() if rows.shape[-1] > 1 else torch.tensor(1.0)
    if not float(step) > 0:
        return None
    rows = rows / step
    plain = (rows - rows.round()).abs().max() < 1e-2 and rows.min() >= 1 and rows.max() < end
    return rows.round().long() - 1 if bool(plain) else None


def _largest(quantizer: Quantizer, x: Tensor) -> Tensor:
    """max|x| as ``(heads, 1, channels)``."""
    x = quantizer.split_heads(x).abs()
    return x.amax(dim=(0, 2))[:, None, :] if x.dim() == 4 else x.new_zeros(0)


def _scaled(quantizer: Quantizer, seen: _Seen, factor: Tensor) -> tuple[Tensor, Tensor]:
    query = (quantizer.split_heads(seen.query) * factor).reshape(seen.query.shape)
    key = (quantizer.split_heads(seen.key) / factor).reshape(seen.key.shape)
    return query, key


def _error(quantizers: tuple[Quantizer, Quantizer], query: Tensor, key: Tensor) -> Tensor:
    """Mean squared error of the product with both sides quantized at their best scale."""
    rounded = []
    for quantizer, x in zip(quantizers, (query, key), strict=True):
        observer = MSEObserver()
        observer.observe(quantizer.groups(x))
        scale, _ = observer.propose(quantizer.spec)
        split, scale = quantizer.split_heads(x), scale.reshape(quantizer.shape)
        spec = quantizer.spec
        rounded.append(dequantize(quantize(split, scale, spec.qmin, spec.qmax), scale).reshape(x.shape))
    wrong = rounded[0] @ rounded[1].transpose(-2, -1) - query @ key.transpose(-2, -1)
    return wrong.square().mean()


def _scale_rows(layers: list[QuantizedLinear], rows: Tensor, factor: Tensor) -> None:
    rows, factor = rows.flatten(), factor.flatten()
    first = 0
    for layer in layers:
        inside = (rows >= first) & (rows < first + layer.out_features)
        local = rows[inside] - first
        layer.weight[local] *= factor[inside, None].to(layer.weight.dtype)
        if layer.bias is not None:
            layer.bias[local] *= factor[inside].to(layer.bias.dtype)
        first += layer.out_features


def _first(value: Any) -> Tensor:
    while not isinstance(value, Tensor):
        value = next(iter(value.values() if isinstance(value, dict) else value))
    return value
