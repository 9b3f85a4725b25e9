"""Even out query and key channels in the weights, where nothing else reads them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gplq.batches import Forward, bounded, tensors_in
from gplq.distributed import maximum, total
from gplq.functional import dequantize, quantize
from gplq.fused_attention import flat_heads, parts_of_heads
from gplq.layers import QuantizedLinear
from gplq.observers import MinMaxObserver, MSEObserver
from gplq.products import QuantizedProduct, unowned_products
from gplq.quantizer import Quantizer
from gplq.record import product_of, record_of

__all__ = ['equalize_queries_and_keys']


@torch.no_grad()
def equalize_queries_and_keys(model: nn.Module, batches: Iterable[Any], forward: Forward) -> int:
    """Multiply query channel c by ``a_c`` and key channel c by ``1 / a_c``, in the rows that make them.

    One scale a head serves all its channels, so channels of very different size waste codes. The product does
    not change, but only where query and key come straight from Linear rows and nothing else reads them: with
    relative positions, a norm or a rotary embedding between, scaling is wrong. Both are tried, not assumed:
    rows are found by sending row numbers through the module, and the outputs of the module and of the whole model must
    stay the same. A change is kept where it lowers the error of the quantized product on the first batch, whose
    forward each module interrupts when its turn comes: only one module's operands are in memory at a time.

    Returns:
        How many products were changed.
    """
    visits = []
    for product in record_of(model).plan.products:
        if (product.left.site, product.right.site) == ('query', 'key'):
            owner = model.get_submodule(product.owner)
            visits.append((owner, _Visit(product_of(owner, product.index))))
    if not visits:
        return 0
    batch = next(iter(bounded(batches, 1)))
    expected = tensors_in(forward(model, batch))
    # In front of the user's own hooks, which run on what is given to the module.
    handles = [
        owner.register_forward_pre_hook(visit, with_kwargs=True, prepend=True) for owner, visit in reversed(visits)
    ]
    try:
        forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    changed = [visit for _, visit in visits if visit.replaced]
    if changed and not _alike(expected, tensors_in(forward(model, batch))):
        # Something outside of a module reads its queries or keys.
        for visit in reversed(changed):
            visit.undo()
        return 0
    return len(changed)


class _Visit:
    """Evens out a product just before its module runs for the first time, when its input is there."""

    def __init__(self, product: QuantizedProduct) -> None:
        self.product = product
        self.done = False
        #: Layers that were changed, each with its weight and bias as they were.
        self.replaced: list[_Replaced] = []

    def __call__(self, owner: nn.Module, args: Any, kwargs: Any) -> None:
        if self.done:
            return
        self.done = True

        def call() -> Any:
            return owner(*args, **kwargs)

        with unowned_products(), _operands(self.product) as operands:
            call()
            self.replaced = _equalize(owner, operands, call)

    def undo(self) -> None:
        """Put back what was replaced."""
        _put_back(self.replaced)
        self.replaced = []


class _Replaced(NamedTuple):
    layer: QuantizedLinear
    weight: Tensor
    bias: Tensor | None


class _Operands:
    """The operands of a query-key product as they last came."""

    def __init__(self, product: QuantizedProduct) -> None:
        self.quantizers = product.operands
        self.query = self.key = torch.empty(0)

    def take_query(self, quantizer: nn.Module, args: tuple[Tensor]) -> None:
        self.query = args[0]

    def take_key(self, quantizer: nn.Module, args: tuple[Tensor]) -> None:
        self.key = args[0].transpose(-2, -1)


class _Onlooker(MinMaxObserver):
    """Has a product show its operands, and learns nothing from them."""

    def observe(self, groups: Tensor) -> None:
        pass


@contextmanager
def _operands(product: QuantizedProduct) -> Iterator[_Operands]:
    """What a product multiplies from now on."""
    operands = _Operands(product)
    query, key = product.operands
    handles = [query.register_forward_pre_hook(operands.take_query), key.register_forward_pre_hook(operands.take_key)]
    query.observer, key.observer = _Onlooker(), _Onlooker()
    try:
        yield operands
    finally:
        query.observer = key.observer = None
        for handle in handles:
            handle.remove()


class _RowNumbers:
    """Replaces a Linear's output by the numbers of its rows, counted on from ``first``."""

    def __init__(self, first: int) -> None:
        self.first = first

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        rows = torch.arange(self.first, self.first + output.shape[-1], dtype=output.dtype, device=output.device)
        return rows.expand(output.shape).clone()


def _equalize(owner: nn.Module, operands: _Operands, call: Callable[[], Any]) -> list[_Replaced]:
    query, key = operands.query, operands.key
    rows = _rows(owner, operands, call)
    if rows is None:
        return []
    layers, query_rows, key_rows = rows
    quantizers = operands.quantizers
    largest_query = maximum(_largest(quantizers[0], query))
    largest_key = maximum(_largest(quantizers[1], key))
    if not largest_query.shape == query_rows.shape == largest_key.shape == key_rows.shape:
        return []
    factor = (largest_key / largest_query).sqrt()
    factor = torch.where(factor.isfinite() & (factor > 0), factor, torch.ones_like(factor))
    before = _error(quantizers, query, key)
    after = _error(quantizers, *_scaled(quantizers, query, key, factor))
    if after >= before:
        return []
    expected = tensors_in(call())
    replaced = [
        _Replaced(layer, layer.weight.clone(), None if layer.bias is None else layer.bias.clone()) for layer in layers
    ]
    _scale_rows(layers, query_rows, factor)
    _scale_rows(layers, key_rows, 1 / factor)
    if _alike(expected, tensors_in(call())):
        return replaced
    _put_back(replaced)
    return []


def _alike(expected: dict[str, Tensor], found: dict[str, Tensor]) -> bool:
    """Whether all floating-point outputs are the same on all ranks, but for rounding."""
    wrong = [torch.zeros(1, device=x.device) for x in expected.values()]
    for error, (name, x) in zip(wrong, expected.items(), strict=True):
        y = found.get(name)
        if y is None or y.shape != x.shape:
            error.fill_(1.0)
        elif x.is_floating_point() and x.numel():
            error.fill_((y - x).abs().max() - 1e-4 * x.abs().max())
    return not wrong or float(maximum(torch.stack([error.to(wrong[0]) for error in wrong]).max())) <= 0


def _put_back(replaced: list[_Replaced]) -> None:
    for layer, weight, bias in replaced:
        layer.weight.copy_(weight)
        if layer.bias is not None and bias is not None:
            layer.bias.copy_(bias)


def _rows(
    owner: nn.Module, operands: _Operands, call: Callable[[], Any]
) -> tuple[list[QuantizedLinear], Tensor, Tensor] | None:
    """The Linears in question and, as ``(heads, 1, channels)``, the row that each query and key channel is."""
    layers = [module for module in owner.modules() if isinstance(module, QuantizedLinear)]
    if not layers:
        return None
    firsts = list(itertools.accumulate((layer.out_features for layer in layers), initial=1))
    # Counted from 1, so that a factor on the query (1 / sqrt(d)) shows in every number.
    handles = [layer.register_forward_hook(_RowNumbers(first)) for layer, first in zip(layers, firsts, strict=False)]
    try:
        call()
    finally:
        for handle in handles:
            handle.remove()
    query = _constant(operands.quantizers[0], operands.query, firsts[-1])
    key = _constant(operands.quantizers[1], operands.key, firsts[-1])
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


def _scaled(
    quantizers: tuple[Quantizer, Quantizer], query: Tensor, key: Tensor, factor: Tensor
) -> tuple[Tensor, Tensor]:
    query = (quantizers[0].split_heads(query) * factor).reshape(query.shape)
    key = (quantizers[1].split_heads(key) / factor).reshape(key.shape)
    return query, key


def _error(quantizers: tuple[Quantizer, Quantizer], query: Tensor, key: Tensor) -> float:
    """Squared error, over all ranks, of the product with both sides quantized at their best scale."""
    rounded = []
    for quantizer, x in zip(quantizers, (query, key), strict=True):
        observer = MSEObserver()
        observer.observe(quantizer.groups(x))
        observer.pool(quantizer.log_scale.numel(), x.device)
        scale, _ = observer.propose(quantizer.spec)
        split, scale = quantizer.split_heads(x), scale.reshape(quantizer.shape)
        spec = quantizer.spec
        rounded.append(dequantize(quantize(split, scale, spec.qmin, spec.qmax), scale).reshape(x.shape))
    # Images may share their keys, as in attention to one text.
    lead = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2])  # type: ignore[no-untyped-call]
    queries, keys = ([flat_heads(x, lead) for x in pair] for pair in zip((query, key), rounded, strict=True))
    wrong = torch.zeros((), device=query.device)
    for part in parts_of_heads(queries[0], keys[0]):
        exact, found = (q[part] @ k[part].mT for q, k in zip(queries, keys, strict=True))
        wrong += (found - exact).square_().sum()
    return float(total(wrong))


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
