"""What the rounding of weights took away, given back in closed form, block by block."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from gplq.batches import Forward, batch_size, bounded
from gplq.column_statistics import ColumnStatistics
from gplq.distributed import everywhere, maximum, rank
from gplq.journal import Journal
from gplq.layers import CompensatedBlock, LinearCompensation, WeightView
from gplq.least_squares import AffineFit, LinearFit
from gplq.plan import MapPlan, Plan
from gplq.progress import Progress
from gplq.recipe import Recipe
from gplq.record import record_of, weight_views
from gplq.rounding import once, round_view
from gplq.spec import FLOAT_BITS
from gplq.swap import swap_class
from gplq.trace import evaluating

__all__ = ['compensate']

_log = logging.getLogger(__name__)

# One sample of four decides, the others fit: the second, so that two samples are enough.
_GROUP, _JUDGE = 4, 1
_STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


class _Reached(Exception):
    """Ends a forward pass once everything of interest has run."""


@torch.no_grad()
def compensate(
    model: nn.Module,
    reference: nn.Module,
    batches: Iterable[Any],
    forward: Forward,
    progress: Progress,
    journal: Journal | None = None,
) -> None:
    """Fit the recipe's compensation to the outputs of ``reference``: the model before rounding as it is meant to be.

    Groups run in the order of the forward pass, later ones see the inputs that earlier ones left. A fit is kept
    only where it explains held-out samples.

    - ``'qwt'``: a matrix a block from the block's input to its output's error (QwT sec. 3, R^2 > 0).
    - ``'ridge'``: each block's last weight refitted on its quantized inputs and rounded anew (ERQ sec. 4.1).
    - ``'erq'``: the same for every Linear.
    - ``'affine'``: gain and shift a channel of every layer, absorbed by scale and bias (QwT-v2).
    """
    recipe = record_of(model).plan.recipe
    samples = recipe.calibration_samples
    source = _Source(batches, samples, forward)
    if recipe.compensation == 'qwt':
        for name in progress(record_of(model).plan.blocks, 'compensate'):
            known = None if journal is None else journal.recall(f'qwt {name}')
            if known is None:
                layer = _fit_block(model, reference, name, source)
                if journal is not None:
                    journal.note(f'qwt {name}', {} if layer is None else layer.state_dict())
            else:
                layer = _known_layer(known, recipe) if known else None
            if layer is not None:
                attach_compensation(model.get_submodule(name), layer.to(next(model.parameters()).device))
        return
    views = list(_rounded_views(model))
    if recipe.compensation == 'ridge':
        views = _last_of_blocks(views, record_of(model).plan)
    if recipe.compensation == 'erq':
        views = [(plan, view) for plan, view in views if not isinstance(view.owner, nn.Conv2d)]
    for _, view in progress(views, recipe.compensation):
        other = _view(reference, view.name)
        if recipe.compensation == 'affine':
            work = partial(_absorb_affine, model, reference, view, other, source)
        else:
            work = partial(_refit, model, reference, view, other, source, recipe)
        once(journal, recipe.compensation, view, work)


class _Source:
    """Runs model and reference on the same batches and says which samples are held out."""

    def __init__(self, batches: Iterable[Any], samples: int, forward: Forward) -> None:
        self.batches = batches
        self.samples = samples
        self.forward = forward

    def pairs(
        self, model: nn.Module, watched: _Watched, reference: nn.Module, watched_there: _Watched
    ) -> Iterator[tuple[Tensor, Tensor, Tensor, bool]]:
        """``(input in model, output in model, output in reference, held out)`` of one module.

        Samples that fit and samples that are held out come one after the other; their first axis may be several of the
        module's own, such as windows, for each sample.
        """
        first = rank()
        for batch in bounded(self.batches, self.samples):
            count = batch_size(batch)
            ours = self._run(model, watched, batch)
            theirs = self._run(reference, watched_there, batch)
            # Some batches may not reach it, as a head for objects where none are.
            if ours is not None and theirs is not None:
                rows = ours[1].shape[0]
                # What is no multiple of the images, such as proposals, are samples of their own.
                samples = count if rows % count == 0 else rows
                judges = (torch.arange(samples, device=ours[1].device) + first) % _GROUP == _JUDGE
                chosen = judges.repeat_interleave(rows // samples)
                for held_out in (False, True):
                    if bool((chosen == held_out).any()):
                        x, y, target = (tensor[chosen == held_out] for tensor in (*ours, theirs[1]))
                        yield x, y, target, held_out
            first += count

    def _run(self, model: nn.Module, watched: _Watched, batch: Any) -> tuple[Tensor, Tensor] | None:
        # What a forward pass draws, such as a sample of proposals, is drawn alike in both models.
        with evaluating(model), watched.running():
            torch.manual_seed(0)
            try:
                self.forward(model, batch)
            except _Reached:
                pass
        return watched.result()


_Fit = TypeVar('_Fit', LinearFit, AffineFit)


class _Fits(Generic[_Fit]):
    """A fit of the samples that decide and one of those that are held out, over all ranks."""

    def __init__(self) -> None:
        self._fits: list[_Fit] = []

    def start(self, make: Callable[[], _Fit]) -> None:
        """Make both, once sizes are known."""
        if not self._fits:
            self._fits = [make(), make()]

    def __getitem__(self, held_out: bool) -> _Fit:
        return self._fits[held_out]

    def pooled(self, name: str, device: torch.device) -> tuple[_Fit, _Fit] | None:
        """What to fit and what to judge by; None, said in the log, without samples for both."""
        # The others cannot pool without a rank that has seen nothing.
        if not everywhere(bool(self._fits), device):
            _log.warning('%s: no batch reached it, it is not compensated', name)
            return None
        for fit in self._fits:
            fit.pool()
        train, judge = self._fits
        if not train.count or not judge.count:
            _log.warning('%s: a single sample cannot be fitted and judged by, it is not compensated', name)
            return None
        return train, judge


class _Watched:
    """Input and output of one module or linear map during one pass, which ends there."""

    def __init__(self) -> None:
        self._x: Tensor | None = None
        self._y: Tensor | None = None

    @contextmanager
    def running(self) -> Iterator[None]:
        raise NotImplementedError

    def keep(self, x: Tensor, y: Tensor) -> None:
        self._x, self._y = x, y
        raise _Reached

    def result(self) -> tuple[Tensor, Tensor] | None:
        """What was seen since the last call of this."""
        x, y = self._x, self._y
        self._x = self._y = None
        return None if x is None or y is None else (x, y)


class _WatchedMap(_Watched):
    def __init__(self, view: WeightView) -> None:
        super().__init__()
        self.view = view

    @contextmanager
    def running(self) -> Iterator[None]:
        self.view.map.watcher = self.keep
        try:
            yield
        finally:
            self.view.map.watcher = None


class _WatchedBlock(_Watched):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def _hook(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.keep(args[0], output)

    @contextmanager
    def running(self) -> Iterator[None]:
        handle = self.block.register_forward_hook(self._hook)
        try:
            yield
        finally:
            handle.remove()


def _rounded_views(model: nn.Module) -> Iterator[tuple[MapPlan, WeightView]]:
    return ((plan, view) for plan, view in weight_views(model) if plan.weight_bits != FLOAT_BITS)


def _view(model: nn.Module, name: str) -> WeightView:
    return next(view for _, view in weight_views(model) if view.name == name)


def _last_of_blocks(views: list[tuple[MapPlan, WeightView]], whole: Plan) -> list[tuple[MapPlan, WeightView]]:
    """The last Linear that each block runs."""
    last = {}
    for plan, view in views:
        block = whole.block_of(plan)
        if block is not None and not isinstance(view.owner, nn.Conv2d):
            last[block] = (plan, view)
    return list(last.values())


def _known_layer(state: dict[str, Tensor], recipe: Recipe) -> LinearCompensation:
    layer = LinearCompensation(state['codes'].shape[0], recipe.compensation_bits)
    layer.load_state_dict(state)
    layer.input.enabled = True
    return layer


def _fit_block(model: nn.Module, reference: nn.Module, name: str, source: _Source) -> LinearCompensation | None:
    """The compensation of one block, None where it explains nothing.

    Blocks in front of it must have theirs already: it sees what they leave.
    """
    block = model.get_submodule(name)
    fits: _Fits[LinearFit] = _Fits()
    largest: Tensor | None = None
    there = reference.get_submodule(name)
    pairs = source.pairs(model, _WatchedBlock(block), reference, _WatchedBlock(there))
    for x, y, target, held_out in pairs:
        fits.start(partial(LinearFit, x.shape[-1], y.shape[-1], x.device))
        fits[held_out].add(x, target - y)
        seen = x.abs().reshape(-1, x.shape[-1]).amax(0)
        largest = seen if largest is None else torch.maximum(largest, seen)
    found = fits.pooled(name, next(model.parameters()).device)
    if found is None or largest is None:
        return None
    train, judge = found
    maximum(largest)
    best, chosen = 0.0, None
    for strength in _STRENGTHS:
        solution = train.solve(strength)
        explained = judge.r_squared(*solution)
        if explained > best:
            best, chosen = explained, solution
    _log.info('%s: compensation explains %.3f of the error', name, best)
    if chosen is None:
        return None
    matrix, bias = chosen
    layer = LinearCompensation(matrix.shape[0], record_of(model).plan.recipe.compensation_bits)
    layer.to(largest.device)
    layer.fit(matrix.float(), bias.float(), largest)
    return layer


def attach_compensation(block: nn.Module, layer: LinearCompensation) -> None:
    """Let ``block`` add ``layer`` of its input to its output."""
    swap_class(block, CompensatedBlock)
    block.compensation = layer


def _absorb_affine(
    model: nn.Module, reference: nn.Module, view: WeightView, other: WeightView, source: _Source
) -> None:
    fits: _Fits[AffineFit] = _Fits()
    for _, y, target, held_out in source.pairs(model, _WatchedMap(view), reference, _WatchedMap(other)):
        if isinstance(view.owner, nn.Conv2d):
            y, target = y.movedim(1, -1), target.movedim(1, -1)
        fits.start(partial(AffineFit, y.shape[-1], y.device))
        fits[held_out].add(y, target)
    found = fits.pooled(view.name, view.matrix().device)
    if found is None:
        return
    train, judge = found
    gain, shift = train.solve()
    bias = view.bias_vector()
    if bias is None:
        # The layer may be called with a bias that is not its own, which a gain would scale as well.
        ones = torch.ones_like(gain)
        gain, shift = ones, (train.sums[2] - train.sums[1]) / train.sums[0].clamp(min=1)
    better = judge.error(gain, shift) < judge.error(torch.ones_like(gain), torch.zeros_like(shift))
    gain = torch.where(better, gain, torch.ones_like(gain)).float()
    shift = torch.where(better, shift, torch.zeros_like(shift)).float()
    quantizer = view.map.weight
    assert quantizer is not None
    # Through the codes, so that the values are those that a saved file restores, to the last bit.
    columns = view.map.column_scale.expand(view.matrix().shape[1])
    codes = quantizer.codes(view.matrix(), columns)
    quantizer.scale.mul_(gain)
    view.write(quantizer.restore(codes, columns))
    own = torch.zeros_like(shift) if bias is None else bias
    correction = view.map.bias_correction
    correction.copy_(gain * (own + correction) + shift - own)
    view.map.corrected = True


def _refit(
    model: nn.Module, reference: nn.Module, view: WeightView, other: WeightView, source: _Source, recipe: Recipe
) -> None:
    """Refit the weight before rounding to the reference's output on this model's inputs, then round it again."""
    original, rounded = other.matrix(), view.matrix()
    fits: _Fits[LinearFit] = _Fits()
    statistics = ColumnStatistics(original.shape[1], original.device)
    for x, y, target, held_out in source.pairs(model, _WatchedMap(view), reference, _WatchedMap(other)):
        fits.start(partial(LinearFit, x.shape[-1], y.shape[-1], x.device))
        # What the unrounded weight would leave to explain; the correction of the first rounding counts as part of y.
        unrounded = y + (x.reshape(-1, x.shape[-1]) @ (original - rounded).t()).reshape(y.shape)
        fits[held_out].add(x, target - (unrounded - view.map.bias_correction))
        statistics.add(x)
    found = fits.pooled(view.name, view.matrix().device)
    if found is None:
        return
    train, judge = found
    statistics.pool()
    best, matrix, shift = 0.0, original, torch.zeros_like(original[:, 0])
    for strength in _STRENGTHS:
        change, bias = train.solve(strength)
        explained = judge.r_squared(change, bias)
        if explained > best:
            best, matrix, shift = explained, original + change.t().float(), bias.float()
    _log.info('%s: refitting explains %.3f of the error', view.name, best)
    round_view(view, recipe, statistics, matrix)
    view.map.bias_correction += shift
    view.map.corrected = True
