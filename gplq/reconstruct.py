"""Learn the rounding of weights block by block, so that each block's output stays what it was (BRECQ, APHQ-ViT)."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, get_type_hints

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.func import functional_call
from torch.utils._pytree import tree_map

from gplq.batches import Forward, bounded
from gplq.errors import RecipeError, StageError
from gplq.independent_copy import independent_copy
from gplq.layers import WeightView
from gplq.objectives import perturbed_kl
from gplq.plan import MapPlan
from gplq.progress import Progress
from gplq.quantizer import Quantizer
from gplq.recipe import Recipe
from gplq.record import floating_point, record_of, weight_views
from gplq.soft_rounding import SoftRounding
from gplq.spec import FLOAT_BITS
from gplq.trace import evaluating
from gplq.typecheck import check_types
from gplq.weights import choose_weight_scales

__all__ = ['Reconstruction', 'reconstruct_blocks']

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reconstruction:
    """Settings of the block reconstruction.

    Attributes:
        iterations: of Adam a block.
        batch_size: entries of a calibration batch, along its first axis, that an iteration takes; all of them where a
            block does not treat each by itself.
        lr: of the rounding variables.
        decision: weight of the term that makes them decide.
        drop: share of quantized inputs that are left in floating point while it learns (QDrop, Wei et al. 2022).
        floating_point: aim at the model without any quantizer; False aims at it with its activations quantized, as the
            activation stage has trained it.
        seed: of batches and of what is dropped.
    """

    iterations: int = 500
    batch_size: int = 32
    lr: float = 1e-2
    decision: float = 0.01
    drop: float = 0.5
    floating_point: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(vars(self), get_type_hints(Reconstruction))
        for name in ('iterations', 'batch_size'):
            if getattr(self, name) < 1:
                raise RecipeError(f'{name}={getattr(self, name)} must be at least 1')
        if not 0 <= self.drop < 1:
            raise RecipeError(f'drop={self.drop} must be in [0, 1)')


@dataclass
class _Sample:
    """One batch of a block: its arguments in the model as quantized so far, and what should come out."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: Tensor
    importance: Tensor | None = None

    def part(self, first: int, count: int) -> _Sample:
        """Some of its entries; tensors of another length than the block's output are taken to be common to all."""
        length = len(self.target)

        def cut(value: Any) -> Any:
            has_entries = isinstance(value, Tensor) and value.dim() > 0 and len(value) == length
            return value.narrow(0, first, count) if has_entries else value

        args, kwargs = tree_map(cut, (self.args, self.kwargs))
        return _Sample(args, kwargs, self.target.narrow(0, first, count), self.importance)


def reconstruct_blocks(
    model: nn.Module,
    batches: Iterable[Any],
    settings: Reconstruction,
    forward: Forward,
    progress: Progress,
) -> frozenset[str]:
    """Round the weights of every block of the plan by learning which way each goes.

    The error of a block's output is squared and weighed by the slope of a divergence beside its minimum, where the
    model gives logits (APHQ-ViT sec. 3.3); all outputs count alike where it gives anything else.

    Args:
        model: calibrated; blocks are rounded in the order of the forward pass, later ones see what earlier ones leave.
        batches: calibration data.
        settings: see there.
        forward: runs one batch.
        progress: wraps an iterable to show how far it is.

    Returns:
        Names of the weights that were rounded; the others are still to be.

    Raises:
        StageError: if a block has no gradient because it overwrites its tensors in place.
    """
    record = record_of(model)
    reference = independent_copy(model)
    by_block: dict[str, list[tuple[MapPlan, WeightView]]] = defaultdict(list)
    for plan, view in weight_views(model):
        block = record.plan.block_of(plan)
        if block is not None and plan.weight_bits != FLOAT_BITS and not isinstance(view.owner, nn.Conv2d):
            by_block[block].append((plan, view))
    done: set[str] = set()
    samples = record.plan.recipe.calibration_samples
    for name in progress(list(by_block), 'reconstruct blocks'):
        try:
            found = _collect(model, reference, name, batches, samples, settings, forward)
            before, after = _fit(model.get_submodule(name), by_block[name], found, settings, record.plan.recipe)
        except RuntimeError as error:
            if 'inplace operation' not in str(error):
                raise
            raise StageError(
                f'{name} or what follows it overwrites a tensor in place that its gradient needs (such as x += …), so '
                "nothing can be learned through it: set rounding='descent'"
            ) from error
        _log.info('%s: error of the output %.3g as rounded to nearest, %.3g as learned', name, before, after)
        done |= {view.name for _, view in by_block[name]}
    return frozenset(done)


def _collect(
    model: nn.Module,
    reference: nn.Module,
    name: str,
    batches: Iterable[Any],
    samples: int,
    settings: Reconstruction,
    forward: Forward,
) -> list[_Sample]:
    found = []
    generator = torch.Generator().manual_seed(settings.seed)
    for batch in bounded(batches, samples):
        # The same random numbers for both, should a forward pass draw any.
        with evaluating(reference), floating_point(reference) if settings.floating_point else nullcontext():
            target, importance = _target(reference, name, batch, forward, generator)
        with evaluating(model):
            args, kwargs, _, _ = _seen(model, name, lambda batch=batch: forward(model, batch))  # type: ignore[misc]
        found.append(_Sample(args, kwargs, target, importance))
    return found


def _target(
    reference: nn.Module, name: str, batch: Any, forward: Forward, generator: torch.Generator
) -> tuple[Tensor, Tensor | None]:
    """A block's output, and the mean size of the slope there over the batch."""
    outputs: list[Any] = []
    with torch.enable_grad():
        _, _, y, edge = _seen(reference, name, lambda: outputs.append(forward(reference, batch)))
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
) -> tuple[tuple[Any, ...], dict[str, Any], Tensor, GradientEdge | None]:
    """Arguments and output of a block's first call, and where the output's gradient passes.

    Copies: blocks may add to their input, or the next one to this one's output, in place.
    """
    arguments: list[tuple[Any, Any]] = []
    outputs: list[tuple[Tensor, GradientEdge | None]] = []

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        if not arguments:
            arguments.append((_copied(args), _copied(kwargs)))

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
    return *arguments[0], *outputs[0]


def _copied(value: Any) -> Any:
    return tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, value)


def _fit(
    block: nn.Module,
    maps: list[tuple[MapPlan, WeightView]],
    samples: list[_Sample],
    settings: Reconstruction,
    recipe: Recipe,
) -> tuple[float, float]:
    """Learn the rounding of one block and write it; the error as rounded to nearest and as learned."""
    names = {id(module): name for name, module in block.named_modules()}
    soft: dict[str, list[SoftRounding]] = defaultdict(list)
    for plan, view in maps:
        quantizer = view.map.weight
        assert quantizer is not None
        folded = view.matrix().float() * view.map.column_scale
        scheme = 'mse' if recipe.weight_scheme == 'searched' else recipe.weight_scheme
        scales = quantizer.scales if quantizer.proposed else choose_weight_scales(folded, plan.weight_bits, scheme)
        key = f'{names[id(view.owner)]}.{view.parameter}'
        soft[key].append(SoftRounding(view, scales, plan.weight_bits))
    roundings = [rounding for group in soft.values() for rounding in group]
    start = [rounding.logit.detach().clone() for rounding in roundings]

    def run(sample: _Sample, hard: bool = False) -> Tensor:
        weights = {}
        for key, group in soft.items():
            parts = [r.values(r.decided()) if hard else r() for r in group]
            like = block.get_parameter(key)
            weights[key] = torch.cat(parts).reshape(like.shape).to(like.dtype)
        y: Tensor = functional_call(block, weights, _copied(sample.args), _copied(sample.kwargs))
        return y

    def error(sample: _Sample, hard: bool = False) -> Tensor:
        squares = (run(sample, hard) - sample.target).float().square()
        return (squares if sample.importance is None else squares * sample.importance).mean()

    with evaluating(block):
        torch.manual_seed(settings.seed)
        before = sum(float(error(s, hard=True)) for s in samples) / len(samples)
        longest = max(samples, key=lambda s: len(s.target))
        divides = _divides(run, longest, settings.batch_size)
        _learn(block, roundings, samples, error, settings.batch_size if divides else len(longest.target), settings)
        after = sum(float(error(s, hard=True)) for s in samples) / len(samples)
    if not after < before:
        # Too few iterations can leave it worse than where it began.
        for rounding, logit in zip(roundings, start, strict=True):
            rounding.logit.data.copy_(logit)
        after = before
    for rounding in roundings:
        rounding.settle()
    return before, after


def _divides(run: Callable[[_Sample], Tensor], sample: _Sample, count: int) -> bool:
    """Whether a block makes of some entries what it makes of them among all."""
    first = len(sample.target) - count
    if first <= 0:
        return True
    with torch.no_grad():
        whole = run(sample).narrow(0, first, count).float()
        try:
            alone = run(sample.part(first, count)).float()
        except (RuntimeError, ValueError, IndexError, AssertionError):
            return False
    # A matrix product of another size may round otherwise, and a code flip.
    return alone.shape == whole.shape and bool((alone - whole).norm() <= 0.01 * whole.norm())


def _learn(
    block: nn.Module,
    roundings: list[SoftRounding],
    samples: list[_Sample],
    error: Callable[[_Sample], Tensor],
    size: int,
    settings: Reconstruction,
) -> None:
    """Learn from batches of at most so many entries."""
    parameters = [rounding.logit for rounding in roundings]
    optimizer = torch.optim.Adam(parameters, lr=settings.lr)
    count = sum(p.numel() for p in parameters)
    scale = 0.0
    quantizers = _quantizers_of(block)
    for number in range(settings.iterations):
        sample = samples[int(torch.randint(len(samples), ()))]
        if (rest := len(sample.target) - size) > 0:
            sample = sample.part(int(torch.randint(rest + 1, ())), size)
        with torch.enable_grad():
            for quantizer in quantizers:
                quantizer.drop = settings.drop
            try:
                loss = error(sample)
            finally:
                for quantizer in quantizers:
                    quantizer.drop = 0.0
            scale = scale or float(loss.detach())
            # Relative to where it began: blocks differ by orders of magnitude.
            total = loss / max(scale, 1e-30)
            done = number / settings.iterations
            if done >= 0.2:
                sharpness = 2 + 18 * 0.5 * (1 + torch.cos(torch.tensor((done - 0.2) / 0.8 * torch.pi)))
                decided = sum((r.indecision(float(sharpness)) for r in roundings), torch.zeros(()))
                total = total + settings.decision * 100 * decided / count
            gradients = torch.autograd.grad(total, parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()


def _quantizers_of(block: nn.Module) -> list[Quantizer]:
    return [module for module in block.modules() if isinstance(module, Quantizer)]
