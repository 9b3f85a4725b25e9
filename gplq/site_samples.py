"""What each layer and product computed in floating point, and the slope of a loss there, for a search over scales."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from gplq.batches import Forward, batch_size, bounded
from gplq.errors import CalibrationError
from gplq.layers import LinearMap
from gplq.products import QuantizedProduct
from gplq.progress import Progress
from gplq.record import named_products, weight_views
from gplq.sample_store import SampleStore

__all__ = ['collect_samples']

# Loss of a model for a batch; called with the sites' quantizers switched off.
Loss = Callable[[nn.Module, Any], Tensor]


class _Call(NamedTuple):
    """Rows of one call that are kept, which they are, and where the gradient of its output passes."""

    tensors: list[Tensor]
    rows: Tensor | None
    shape: torch.Size
    edge: GradientEdge | None


class _Watch:
    """Sees the calls of one site and keeps some of each; the model may overwrite the tensors as soon as it goes on."""

    def __init__(self, name: str, generator: torch.Generator, merged_heads: int = 0) -> None:
        self.name = name
        self.limit = 0
        self.generator = generator
        self.merged_heads = merged_heads
        self.calls: list[_Call] = []

    def map(self, x: Tensor, y: Tensor) -> None:
        vectors = x.reshape(-1, x.shape[-1])
        rows = self._choose(len(vectors), x.device)
        self.calls.append(_Call([vectors[rows].float()], rows, y.shape, _edge(y)))

    def product(self, left: Tensor, right: Tensor, y: Tensor) -> None:
        # Where there is no axis of images or windows, the whole product is one.
        rows = None if y.dim() < 3 else self._choose(len(y), y.device)
        kept = []
        for x in (left, right, y.detach()):
            # An operand without that axis, or with one entry in it, meets every image alike.
            alike = rows is None or x.dim() < y.dim() or len(x) == 1 < len(y)
            kept.append((x.clone() if alike else x[rows]).float())
        self.calls.append(_Call(kept, rows, y.shape, _edge(y)))

    def _choose(self, count: int, device: torch.device) -> Tensor:
        """Vectors of a layer, images or windows of a product with all of their heads."""
        heads = self.merged_heads or 1
        chosen = torch.randperm(count // heads, generator=self.generator)[: self.limit]
        return (chosen[:, None] * heads + torch.arange(heads)).flatten().to(device)

    def keep(self, store: SampleStore, gradients: Iterator[Tensor | None]) -> None:
        """Move what was seen into the store, with the gradients."""
        for tensors, rows, shape, _ in self.calls:
            slope = next(gradients)
            if slope is None:
                slope = tensors[0].new_zeros(shape)
            if len(tensors) == 1:
                slope = slope.reshape(-1, slope.shape[-1])
            store.add(self.name, *tensors, (slope if rows is None else slope[rows]).float())
        self.calls = []


def _edge(y: Tensor) -> GradientEdge | None:
    # Of the value as it is now: an operation in place that follows would be differentiated as well.
    return get_gradient_edge(y) if y.requires_grad else None


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
    progress: Progress,
) -> None:
    """Run batches and keep samples of every Linear and product.

    Args:
        model: calibrated, its quantizers as the loss wants them.
        batches: calibration data.
        loss: gives the gradients; None leaves them zero.
        forward: runs a batch where there is no loss.
        store: takes ``(input, gradient)`` of each layer as matrices of vectors, and
            ``(left, right, output, gradient)`` of each product, a group for each call.
        images: to run.
        vectors: kept of a layer, over all images.
        maps: images or windows kept of a product, over all images.
        progress: wraps an iterable to show how far it is.

    Raises:
        CalibrationError: if the loss does not depend on the model or is not finite.
    """
    generator = torch.Generator().manual_seed(0)
    with _watching(model, generator) as watches:
        for batch in progress(bounded(batches, images), 'collect samples'):
            share = min(1.0, batch_size(batch) / images)
            for watch in watches.values():
                whole = maps if ':' in watch.name else vectors
                watch.limit = max(1, round(whole * share))
            with torch.enable_grad():
                value = None if loss is None else loss(model, batch)
                if loss is None:
                    forward(model, batch)
            edges = [call.edge for watch in watches.values() for call in watch.calls]
            gradients = iter(_gradients(value, edges))
            for watch in watches.values():
                watch.keep(store, gradients)


def _gradients(value: Tensor | None, edges: list[GradientEdge | None]) -> list[Tensor | None]:
    if value is None:
        return [None] * len(edges)
    if not bool(torch.isfinite(value)):
        raise CalibrationError(f'the loss of a calibration batch is {float(value)}; check the checkpoint')
    moving = [edge for edge in edges if edge is not None]
    if not moving or not value.requires_grad:
        raise CalibrationError('the loss does not depend on what is quantized: nothing says which outputs matter')
    found = iter(torch.autograd.grad(value, moving, allow_unused=True))
    return [None if edge is None else next(found) for edge in edges]


@contextmanager
def _watching(model: nn.Module, generator: torch.Generator) -> Iterator[dict[str, _Watch]]:
    """Watch every Linear and product; parameters take part in the gradient whether they are trained or not."""
    watches: dict[str, _Watch] = {}
    with ExitStack() as stack:
        watched: list[LinearMap | QuantizedProduct] = []
        for _, view in weight_views(model):
            if not isinstance(view.owner, nn.Conv2d):
                watches[view.name] = _Watch(view.name, generator)
                view.map.watcher = watches[view.name].map
                watched.append(view.map)
        for name, product in named_products(model):
            heads = max(operand.merged_heads for operand in product.operands)
            watches[name] = _Watch(name, generator, heads)
            product.watcher = watches[name].product
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
