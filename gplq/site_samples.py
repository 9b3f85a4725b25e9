"""What each layer and product computed in floating point, and the slope of a loss there, for a search over scales."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gplq.batches import Forward, batch_size, bounded
from gplq.distributed import world_size
from gplq.errors import CalibrationError
from gplq.layers import LinearMap
from gplq.products import QuantizedProduct
from gplq.progress import Progress
from gplq.record import named_products, weight_views
from gplq.sample_store import SampleStore

__all__ = ['SiteSamples', 'collect_samples']

_log = logging.getLogger(__name__)

# Loss of a model for a batch; called with the sites' quantizers as the search wants them.
Loss = Callable[[nn.Module, Any], Tensor]


class SiteSamples:
    """Samples of every site in a store, a group for each of its calls."""

    def __init__(self, store: SampleStore) -> None:
        self._store = store
        self._shapes: dict[str, list[torch.Size]] = defaultdict(list)

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def add(self, name: str, tensors: list[Tensor], output: torch.Size) -> str:
        """Keep what one call read and gave; its slope, of the shape ``output``, follows under the name returned."""
        key = f'{name}#{len(self._shapes[name])}'
        self._shapes[name].append(output)
        self._store.add(key, *tensors)
        return f'{key} slope'

    def add_slope(self, key: str, slope: Tensor) -> None:
        """Keep the slope of a call."""
        self._store.add(key, slope)

    def take(self, name: str) -> list[list[Tensor]]:
        """Groups of a site, the slope last: zero where none came. Their memory and files are given up."""
        groups = []
        for number, shape in enumerate(self._shapes.pop(name)):
            tensors = self._store.take(f'{name}#{number}')
            slope = self._store.take(f'{name}#{number} slope') or [tensors[0].new_zeros(shape)]
            groups.append(tensors + slope)
        return groups


class _Watch:
    """Sees the calls of one site and keeps some of each; the model may overwrite the tensors as soon as it goes on."""

    def __init__(
        self, name: str, samples: SiteSamples, generator: torch.Generator, rows: int = 0, merged_heads: int = 0
    ) -> None:
        self.name = name
        self.samples = samples
        self.generator = generator
        self.rows = rows
        self.merged_heads = merged_heads
        # Set for each batch: samples that are kept of a call, and bytes that they may have.
        self.limit = 0
        self.bytes = 0.0
        self.slopes = 0
        self._told = False

    def map(self, x: Tensor, y: Tensor) -> None:
        vectors = x.reshape(-1, x.shape[-1])
        limit = self._within(self.limit, 4 * (x.shape[-1] + y.shape[-1]), self.bytes)
        rows = self._choose(len(vectors), limit, x.device)
        self._keep([vectors[rows]], y, lambda slope: slope.reshape(-1, slope.shape[-1])[rows], (len(rows), y.shape[-1]))

    def product(self, left: Tensor, right: Tensor, y: Tensor) -> None:
        heads, batched = self.merged_heads or 1, y.dim() >= 3
        # Bytes of a row of the product, slope and left operand included, and of what all rows share.
        of_row = 4 * (2 * (y[:heads] if batched else y).numel() + _entry(left, y, heads)) / y.shape[-2]
        shared = 4 * _entry(right, y, heads)
        count = y.shape[-2]
        rows = None
        if 2 <= left.dim() and left.shape[-2] == count and self.rows:
            # Rows of the left operand are rows of the product: each stands for others like it.
            count = self._within(min(count, self.rows), of_row, self.bytes - shared)
            if count < y.shape[-2]:
                rows = torch.randperm(y.shape[-2], generator=self.generator)[:count].to(y.device)
        entries = None
        if batched:
            limit = self._within(self.limit, count * of_row + shared, self.bytes)
            entries = self._choose(len(y), limit, y.device)

        # Not the product itself, which would hold the hook that holds it.
        dims, length = y.dim(), len(y)

        def part(x: Tensor, has_rows: bool) -> Tensor:
            # An operand without the axis of images or windows, or with one entry in it, meets every image alike.
            alike = entries is None or x.dim() < dims or len(x) == 1 < length
            found = x if alike else x[entries]
            found = found if rows is None or not has_rows else found.index_select(-2, rows)
            return found.clone() if found is x else found

        output = part(y.detach(), True)
        self._keep([part(left, True), part(right, False), output], y, lambda slope: part(slope, True), output.shape)

    def _keep(
        self, tensors: list[Tensor], y: Tensor, part: Callable[[Tensor], Tensor], shape: tuple[int, ...] | torch.Size
    ) -> None:
        """Into the store now, and the part of the slope as soon as it is known, so that none waits for the others."""
        key = self.samples.add(self.name, [tensor.float() for tensor in tensors], torch.Size(shape))

        def slope(gradient: Tensor) -> None:
            self.samples.add_slope(key, part(gradient.detach()).float())
            self.slopes += 1

        if y.requires_grad:
            # Of the value as it is now: an operation in place that follows has a gradient of its own.
            y.register_hook(slope)  # type: ignore[no-untyped-call]

    def _within(self, limit: int, size: float, room_for: float) -> int:
        """As many things of ``size`` bytes as there is room for, at least one."""
        room = max(1, int(room_for / size))
        if room < limit and not self._told:
            self._told = True
            _log.info('%s: memory_mb leaves room for %d of %d samples or rows of a batch', self.name, room, limit)
        return min(limit, room)

    def _choose(self, count: int, limit: int, device: torch.device) -> Tensor:
        """Vectors of a layer, images or windows of a product with all of their heads."""
        heads = self.merged_heads or 1
        chosen = torch.randperm(count // heads, generator=self.generator)[:limit]
        return (chosen[:, None] * heads + torch.arange(heads)).flatten().to(device)


def _entry(x: Tensor, y: Tensor, heads: int) -> int:
    """Elements of an operand that belong to one entry of the product's first axis, which all of its heads share."""
    return x[:heads].numel() if x.dim() == y.dim() and len(x) == len(y) else 0


def collect_samples(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss | None,
    forward: Forward,
    store: SampleStore,
    *,
    images: int,
    vectors: int,
    maps: int,
    rows: int,
    site_mb: float,
    products: bool,
    progress: Progress,
) -> SiteSamples:
    """Run batches and keep samples of every Linear and product.

    Args:
        model: calibrated, its quantizers as the loss wants them.
        batches: calibration data.
        loss: gives the gradients; None leaves them zero.
        forward: runs a batch where there is no loss.
        store: where they lie until they are asked for.
        images: to run, over all ranks.
        vectors: kept of a layer, over all images.
        maps: images or windows kept of a product, over all images.
        rows: kept of each of these, of the left operand and of the product.
        site_mb: that the samples of one site may have; fewer are kept where they would have more.
        products: whether products are of interest.
        progress: wraps an iterable to show how far it is.

    Returns:
        Groups ``(input, gradient)`` of each layer as matrices of vectors, ``(left, right, output, gradient)`` of each
        product.

    Raises:
        CalibrationError: if the loss does not depend on the model or is not finite.
    """
    generator = torch.Generator().manual_seed(0)
    samples = SiteSamples(store)
    own = max(1, images // world_size())
    with _watching(model, samples, generator, rows if products else None) as watches:
        for batch in progress(bounded(batches, own), 'collect samples'):
            share = min(1.0, batch_size(batch) / images)
            for watch in watches:
                whole = maps if ':' in watch.name else vectors
                watch.limit = max(1, round(whole * share))
                watch.bytes = site_mb * 2**20 * share * world_size()
            if loss is None:
                with torch.no_grad():
                    forward(model, batch)
            else:
                with torch.enable_grad():
                    _differentiate(model, loss(model, batch))
                if not any(watch.slopes for watch in watches):
                    raise CalibrationError(
                        'the loss does not depend on what is quantized: nothing says which outputs matter'
                    )
    return samples


def _differentiate(model: nn.Module, value: Tensor) -> None:
    """Run backward for the sake of the sites' hooks; parameters keep the gradients that they have."""
    if not bool(torch.isfinite(value)):
        raise CalibrationError(f'the loss of a calibration batch is {float(value)}; check the checkpoint')
    if value.requires_grad:
        moving = [p for p in model.parameters() if p.requires_grad]
        torch.autograd.grad(value, moving, allow_unused=True)


@contextmanager
def _watching(
    model: nn.Module, samples: SiteSamples, generator: torch.Generator, rows: int | None
) -> Iterator[list[_Watch]]:
    """Watch every Linear and product; parameters take part in the gradient whether they are trained or not."""
    watches: list[_Watch] = []
    with ExitStack() as stack:
        watched: list[LinearMap | QuantizedProduct] = []
        for _, view in weight_views(model):
            if not isinstance(view.owner, nn.Conv2d):
                watches.append(_Watch(view.name, samples, generator))
                view.map.watcher = watches[-1].map
                watched.append(view.map)
        for name, product in named_products(model) if rows is not None else ():
            if product.einsum:
                # Which axes are rows and columns is the equation's secret.
                continue
            heads = max(operand.merged_heads for operand in product.operands)
            # Rows that have scales of their own are all needed.
            own = any(len(operand.shape) > 1 and operand.shape[-2] > 1 for operand in product.operands)
            watches.append(_Watch(name, samples, generator, 0 if own else rows or 0, heads))
            product.watcher = watches[-1].product
            watched.append(product)
        frozen = [p for p in model.parameters() if p.is_floating_point() and not p.requires_grad]
        for parameter in frozen:
            parameter.requires_grad_(True)
        stack.callback(_release, watched, frozen)
        yield watches


def _release(watched: list[LinearMap | QuantizedProduct], frozen: list[nn.Parameter]) -> None:
    for module in watched:
        module.watcher = None
    for parameter in frozen:
        parameter.requires_grad_(False)
