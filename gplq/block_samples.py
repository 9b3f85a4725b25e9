"""What a block reads in the model as rounded so far, and what should come out of it, within a memory budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

from gplq.batches import Forward, bounded
from gplq.objectives import perturbed_kl
from gplq.sample_store import SampleStore
from gplq.trace import evaluating

__all__ = ['BlockSample', 'BlockSamples', 'collect_blocks', 'copied']


@dataclass
class BlockSample:
    """One batch of a block: its arguments in the model as quantized so far, and what should come out."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: Tensor
    importance: Tensor | None = None

    def part(self, first: int, count: int) -> BlockSample:
        """Some of its entries; tensors of another length than the block's output are taken to be common to all."""
        length = len(self.target)

        def cut(value: Any) -> Any:
            has_entries = isinstance(value, Tensor) and value.dim() > 0 and len(value) == length
            return value.narrow(0, first, count) if has_entries else value

        args, kwargs = tree_map(cut, (self.args, self.kwargs))
        return BlockSample(args, kwargs, self.target.narrow(0, first, count), self.importance)


class BlockSamples:
    """Samples of one block whose tensors lie in a store."""

    def __init__(self, store: SampleStore) -> None:
        self._store = store
        # Of each: what is no tensor, where tensors go, and how it is put together again.
        self._outlines: list[tuple[list[Any], TreeSpec]] = []
        self.lengths: list[int] = []

    def __len__(self) -> int:
        return len(self._outlines)

    def __iter__(self) -> Iterator[BlockSample]:
        return (self[number] for number in range(len(self)))

    def add(self, sample: BlockSample) -> None:
        """Keep one more."""
        leaves, spec = tree_flatten((sample.args, sample.kwargs, sample.target, sample.importance))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        self._store.add(str(len(self)), *tensors)
        self._outlines.append(([_HERE if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec))
        self.lengths.append(len(sample.target))

    def __getitem__(self, number: int) -> BlockSample:
        leaves, spec = self._outlines[number]
        tensors = iter(self._store.read(str(number)))
        return BlockSample(*tree_unflatten([next(tensors) if leaf is _HERE else leaf for leaf in leaves], spec))


# Stands where a tensor was.
_HERE = object()


def collect_blocks(
    model: nn.Module,
    reference: nn.Module,
    name: str,
    batches: Iterable[Any],
    samples: int,
    forward: Forward,
    store: SampleStore,
    seed: int,
) -> BlockSamples:
    """Run both models and keep what the block reads and should give; batches that do not reach it leave nothing.

    Args:
        model: its blocks in front of this one are rounded.
        reference: the model as it is meant to be.
        name: of the block.
        batches: calibration data.
        samples: of them that are read.
        forward: runs one batch.
        store: where tensors lie.
        seed: of the divergence whose slope says which outputs matter.
    """
    found = BlockSamples(store)
    generator = torch.Generator().manual_seed(seed)
    for batch in bounded(batches, samples):
        with evaluating(reference):
            aim = _target(reference, name, batch, forward, generator)
        with evaluating(model):
            seen = _seen(model, name, lambda batch=batch: forward(model, batch))  # type: ignore[misc]
        if aim is not None and seen is not None:
            found.add(BlockSample(seen[0], seen[1], *aim))
    return found


def _target(
    reference: nn.Module, name: str, batch: Any, forward: Forward, generator: torch.Generator
) -> tuple[Tensor, Tensor | None] | None:
    """A block's output, and the mean size of the slope there over the batch; None where it was not reached."""
    outputs: list[Any] = []
    with torch.enable_grad():
        seen = _seen(reference, name, lambda: outputs.append(forward(reference, batch)))
        if seen is None:
            return None
        _, _, y, edge = seen
        logits = outputs[0]
        # A single logit has no divergence.
        several = isinstance(logits, Tensor) and logits.dim() == 2 and logits.shape[1] > 1
        if not several or edge is None or not logits.requires_grad:
            return y, None
        (slope,) = torch.autograd.grad(perturbed_kl(logits, generator), [edge])
    importance = slope.abs().mean(dim=0, keepdim=True)
    largest = importance.max()
    if not (bool(torch.isfinite(largest)) and float(largest) > 0):
        return y, None
    return y, importance / importance.mean()


def _seen(
    model: nn.Module, name: str, run: Callable[[], Any]
) -> tuple[tuple[Any, ...], dict[str, Any], Tensor, GradientEdge | None] | None:
    """Arguments and output of a block's first call, if there is one, and where the output's gradient passes.

    Copies: blocks may add to their input, or the next one to this one's output, in place.
    """
    arguments: list[tuple[Any, Any]] = []
    outputs: list[tuple[Tensor, GradientEdge | None]] = []

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        if not arguments:
            arguments.append((copied(args), copied(kwargs)))

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not outputs:
            edge = get_gradient_edge(output) if output.requires_grad else None
            outputs.append((output.detach().clone(), edge))

    block = model.get_submodule(name)
    handles = [
        block.register_forward_pre_hook(before, with_kwargs=True),
        block.register_forward_hook(after, with_kwargs=True),
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return (*arguments[0], *outputs[0]) if outputs else None


def copied(value: Any) -> Any:
    """Tensors of a tree without gradient and in memory of their own."""
    return tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, value)
