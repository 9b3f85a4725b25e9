"""What each layer and product computed in floating point, and the slope of a loss there, for a search over scales."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

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


class _Watch:
    """Sees the calls of one site and keeps some of each, once the gradient is known."""

    def __init__(self, name: str, limit: int, generator: torch.Generator) -> None:
        self.name = name
        self.limit = limit
        self.generator = generator
        self.seen: list[tuple[tuple[Tensor, ...], Tensor]] = []

    def map(self, x: Tensor, y: Tensor) -> None:
        self.seen.append(((x,), y))

    def product(self, left: Tensor, right: Tensor, y: Tensor) -> None:
        self.seen.append(((left, right), y))

    def keep(self, store: SampleStore, gradients: Iterator[Tensor | None]) -> None:
        """Move what was seen into the store: operands, output, gradient."""
        for operands, y in self.seen:
            slope = next(gradients)
            slope = torch.zeros_like(y) if slope is None else slope
            tensors = [*operands, y.detach(), slope]
            if len(operands) == 1:
                tensors = [t.reshape(-1, t.shape[-1]) for t in tensors]
            # Vectors of a layer, images or windows of a product.
            chosen = torch.randperm(len(tensors[0]), generator=self.generator)[: self.limit].to(y.device)
            store.add(self.name, *(t[chosen].float() for t in tensors))
        self.seen = []


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
        store: takes ``(input, output, gradient)`` of each layer as matrices of vectors, and
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
            share = batch_size(batch) / images
            for watch in watches.values():
                whole = maps if ':' in watch.name else vectors
                watch.limit = max(1, round(whole * share))
            with torch.enable_grad():
                value = None if loss is None else loss(model, batch)
                if loss is None:
                    forward(model, batch)
            outputs = [y for watch in watches.values() for _, y in watch.seen]
            store_gradients = iter(_gradients(value, outputs))
            for watch in watches.values():
                watch.keep(store, store_gradients)


def _gradients(value: Tensor | None, outputs: list[Tensor]) -> list[Tensor | None]:
    if value is None:
        return [None] * len(outputs)
    if not bool(torch.isfinite(value)):
        raise CalibrationError(f'the loss of a calibration batch is {float(value)}; check the checkpoint')
    moving = [y for y in outputs if y.requires_grad]
    if not moving or not value.requires_grad:
        raise CalibrationError('the loss does not depend on what is quantized: nothing says which outputs matter')
    found = iter(torch.autograd.grad(value, moving, allow_unused=True))
    return [next(found) if y.requires_grad else None for y in outputs]


@contextmanager
def _watching(model: nn.Module, generator: torch.Generator) -> Iterator[dict[str, _Watch]]:
    """Watch every Linear and product; parameters take part in the gradient whether they are trained or not."""
    watches: dict[str, _Watch] = {}
    with ExitStack() as stack:
        watched: list[LinearMap | QuantizedProduct] = []
        for _, view in weight_views(model):
            if not isinstance(view.owner, nn.Conv2d):
                watches[view.name] = _Watch(view.name, 0, generator)
                view.map.watcher = watches[view.name].map
                watched.append(view.map)
        for name, product in named_products(model):
            watches[name] = _Watch(name, 0, generator)
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
