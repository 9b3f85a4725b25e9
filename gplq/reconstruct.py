"""Learn the rounding of weights block by block, so that each block's output stays what it was (BRECQ, APHQ-ViT)."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, get_type_hints

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gplq.batches import Forward
from gplq.block_samples import BlockSample, BlockSamples, collect_blocks, copied
from gplq.distributed import everywhere, failing_together, world_size
from gplq.distributed import total as total_of
from gplq.errors import RecipeError, StageError
from gplq.independent_copy import independent_copy
from gplq.journal import Journal
from gplq.layers import WeightView
from gplq.plan import MapPlan
from gplq.progress import Progress
from gplq.quantizer import Quantizer
from gplq.recipe import Recipe
from gplq.record import as_meant, record_of, weight_views
from gplq.rounding import note, recalled
from gplq.sample_store import SampleStore
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
        seed: of batches and of what is dropped.
        memory_mb: of a block's inputs and outputs in memory; more lie in temporary files. What one iteration takes,
            and the forward and backward pass of a batch, comes on top.
    """

    iterations: int = 500
    batch_size: int = 32
    lr: float = 1e-2
    decision: float = 0.01
    drop: float = 0.5
    seed: int = 0
    memory_mb: float = 2048.0

    def __post_init__(self) -> None:
        check_types(vars(self), get_type_hints(Reconstruction))
        for name in ('iterations', 'batch_size'):
            if getattr(self, name) < 1:
                raise RecipeError(f'{name}={getattr(self, name)} must be at least 1')
        if not 0 <= self.drop < 1:
            raise RecipeError(f'drop={self.drop} must be in [0, 1)')
        if not self.memory_mb >= 0:
            raise RecipeError(f'memory_mb={self.memory_mb} must not be negative')


def reconstruct_blocks(
    model: nn.Module,
    batches: Iterable[Any],
    settings: Reconstruction,
    forward: Forward,
    progress: Progress,
    journal: Journal | None = None,
) -> frozenset[str]:
    """Round the weights of every block of the plan by learning which way each goes.

    The error of a block's output is squared and weighed by the slope of a divergence beside its minimum, where the
    model gives logits (APHQ-ViT sec. 3.3); all outputs count alike where it gives anything else. The aim is the model
    without any quantizer, or with its activations quantized where they were trained to be. Several ranks learn the
    same from all their samples.

    Args:
        model: calibrated; blocks are rounded in the order of the forward pass, later ones see what earlier ones leave.
        batches: calibration data.
        settings: see there.
        forward: runs one batch.
        progress: wraps an iterable to show how far it is.
        journal: knows blocks that were finished before.

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
        views = [view for _, view in by_block[name]]
        if recalled(journal, f'reconstruct {name}', views):
            done |= {view.name for view in views}
            continue
        try:
            with SampleStore(settings.memory_mb) as store:
                with as_meant(reference), failing_together():
                    found = collect_blocks(model, reference, name, batches, samples, forward, store, settings.seed)
                if not everywhere(len(found) > 0, next(model.parameters()).device):
                    _log.warning('%s: no batch reached it, nothing is learned about it', name)
                    continue
                before, after = _fit(model.get_submodule(name), by_block[name], found, settings, record.plan.recipe)
        except RuntimeError as error:
            if 'inplace operation' not in str(error):
                raise
            raise StageError(
                f'{name} or what follows it overwrites a tensor in place that its gradient needs (such as x += …), so '
                "nothing can be learned through it: set rounding='descent'"
            ) from error
        _log.info('%s: error of the output %.3g as rounded to nearest, %.3g as learned', name, before, after)
        note(journal, f'reconstruct {name}', views)
        done |= {view.name for view in views}
    return frozenset(done)


def _fit(
    block: nn.Module,
    maps: list[tuple[MapPlan, WeightView]],
    samples: BlockSamples,
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

    def run(sample: BlockSample, hard: bool = False) -> Tensor:
        weights = {}
        for key, group in soft.items():
            parts = [r.values(r.decided()) if hard else r() for r in group]
            like = block.get_parameter(key)
            weights[key] = torch.cat(parts).reshape(like.shape).to(like.dtype)
        y: Tensor = functional_call(block, weights, copied(sample.args), copied(sample.kwargs))
        return y

    def error(sample: BlockSample, hard: bool = False) -> Tensor:
        squares = (run(sample, hard) - sample.target).float().square()
        return (squares if sample.importance is None else squares * sample.importance).mean()

    with evaluating(block):
        torch.manual_seed(settings.seed)
        before = _mean([float(error(s, hard=True)) for s in samples], start[0].device)
        longest = samples[samples.lengths.index(max(samples.lengths))]
        divides = _divides(run, longest, settings.batch_size)
        _learn(block, roundings, samples, error, settings.batch_size if divides else len(longest.target), settings)
        after = _mean([float(error(s, hard=True)) for s in samples], start[0].device)
    if not after < before:
        # Too few iterations can leave it worse than where it began.
        for rounding, logit in zip(roundings, start, strict=True):
            rounding.logit.data.copy_(logit)
        after = before
    for rounding in roundings:
        rounding.settle()
    return before, after


def _divides(run: Callable[[BlockSample], Tensor], sample: BlockSample, count: int) -> bool:
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
    samples: BlockSamples,
    error: Callable[[BlockSample], Tensor],
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
            # Relative to where it began: blocks differ by orders of magnitude.
            scale = scale or _mean([float(loss.detach())], loss.device)
            total = loss / max(scale, 1e-30)
            done = number / settings.iterations
            if done >= 0.2:
                sharpness = 2 + 18 * 0.5 * (1 + torch.cos(torch.tensor((done - 0.2) / 0.8 * torch.pi)))
                decided = sum((r.indecision(float(sharpness)) for r in roundings), torch.zeros(()))
                total = total + settings.decision * 100 * decided / count
            gradients = torch.autograd.grad(total, parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = total_of(gradient) / world_size()
        optimizer.step()


def _quantizers_of(block: nn.Module) -> list[Quantizer]:
    return [module for module in block.modules() if isinstance(module, Quantizer)]


def _mean(errors: list[float], device: torch.device) -> float:
    """Over the samples of all ranks."""
    sums = total_of(torch.tensor([sum(errors), len(errors)], dtype=torch.float64, device=device))
    return float(sums[0] / sums[1])
