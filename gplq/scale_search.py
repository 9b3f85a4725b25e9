"""PTQ4ViT's search: weight and activation scales in turn, by what their rounding does to the layer's output."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor, nn

from gplq.batches import Forward, bounded, default_forward, rereadable
from gplq.errors import RecipeError, StageError
from gplq.functional import dequantize, quantize
from gplq.layers import WeightView
from gplq.objectives import Objective, fisher, perturbed_kl, quantized_kl
from gplq.output_error import Metric, OutputError
from gplq.products import QuantizedProduct
from gplq.progress import Progress, no_progress
from gplq.quantizer import Quantizer
from gplq.record import Stage, floating_point, named_products, record_of, weight_views
from gplq.rounding import at_scales, weights_rounded
from gplq.row_quantizer import RowQuantizer
from gplq.sample_store import SampleStore
from gplq.site_samples import collect_samples
from gplq.spec import FLOAT_BITS
from gplq.trace import evaluating
from gplq.two_part import TwoPartQuantizer, TwoPartScale, candidates, parts_of, steps_of_parts
from gplq.typecheck import check_types
from gplq.weights import WeightScales, choose_weight_scales

__all__ = ['ScaleSearch', 'search_scales']

_log = logging.getLogger(__name__)

# Values of candidates' outputs that are worked on at once.
_CHUNK = 1 << 23


@dataclass(frozen=True)
class ScaleSearch:
    """Settings of the search (PTQ4ViT sec. 3.3 and its released code).

    Attributes:
        metric: of the output's error.
        objective: whose gradients weigh it, see :mod:`gplq.objectives`; a task's own loss takes its place.
        rounds: how often weight and activation, or both operands of a product, take turns.
        candidates: scales that are tried for each in a turn, evenly from ``smallest`` to ``largest``.
        smallest: as a share of the scale that represents the largest value.
        largest: likewise.
        images: that are run to find inputs, outputs and gradients.
        vectors: inputs of a layer that the error is taken over.
        maps: images or windows of a product likewise.
        memory_mb: of samples in memory; more lie in temporary files.
    """

    metric: Metric = 'hessian'
    objective: Objective = 'fisher'
    rounds: int = 3
    candidates: int = 100
    smallest: float = 0.01
    largest: float = 1.2
    images: int = 32
    vectors: int = 1024
    maps: int = 32
    memory_mb: float = 2048.0

    def __post_init__(self) -> None:
        check_types(vars(self), get_type_hints(ScaleSearch))
        for name in ('rounds', 'candidates', 'images', 'vectors', 'maps'):
            if getattr(self, name) < 1:
                raise RecipeError(f'{name}={getattr(self, name)} must be at least 1')
        if not 0 < self.smallest < self.largest:
            raise RecipeError(f'smallest={self.smallest} must be above 0 and below largest={self.largest}')
        if self.memory_mb < 0:
            raise RecipeError(f'memory_mb={self.memory_mb} must not be negative')


def search_scales(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    search: ScaleSearch | None = None,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    forward: Forward = default_forward,
    progress: Progress = no_progress,
) -> None:
    """Choose scales of weights and activations anew, a site at a time, all others in floating point.

    The weights are not rounded yet: :func:`gplq.quantize_weights` does that with the scales found, where the recipe
    has ``weight_scheme='searched'``.

    Args:
        model: calibrated.
        batches: calibration data; ``search.images`` are read.
        search: settings.
        loss: task loss of ``(model, batch)`` whose gradients weigh the errors, such as a detector's; None takes
            ``search.objective`` of what ``forward`` returns, logits ``(batch, classes)``.
        forward: runs one batch.
        progress: wraps an iterable to show how far it is.

    Raises:
        StageError: if the model is not calibrated, or an objective needs logits and there are none.
        CalibrationError: if batches are missing, empty or not finite.
    """
    record_of(model, Stage.CALIBRATED)
    search = search or ScaleSearch()
    batches = rereadable(batches, search.images)
    if search.metric == 'hessian' and loss is None and search.objective == 'quantized_kl':
        # Run twice, in the same order: a loader that shuffles would compare one image with another.
        batches = list(bounded(batches, search.images))
    with SampleStore(search.memory_mb) as store, evaluating(model):
        if search.metric != 'hessian':
            loss = None
        elif loss is None:
            loss = _objective(model, batches, search, forward)
        with floating_point(model):
            collect_samples(
                model,
                batches,
                loss,
                forward,
                store,
                images=search.images,
                vectors=search.vectors,
                maps=search.maps,
                progress=progress,
            )
        layers = {view.name: (view, plan.weight_bits) for plan, view in weight_views(model)}
        products = dict(named_products(model))
        for name in progress([name for name in (*layers, *products) if name in store], 'search scales'):
            if name in layers:
                _search_layer(*layers.pop(name), store.take(name), search)
            else:
                _search_product(products[name], store.take(name), search)
        for view, bits in layers.values():
            _propose_unseen(view, bits)


def _propose_unseen(view: WeightView, bits: int) -> None:
    """Scales of least squared error for a weight that these images did not reach; convolutions have them anyway."""
    if view.map.weight is None or bits == FLOAT_BITS or isinstance(view.owner, nn.Conv2d):
        return
    _log.warning('%s: no image of the search reached it, its scales are those of least squared error', view.name)
    exact = view.matrix().float() * view.map.column_scale
    view.map.weight.propose(choose_weight_scales(exact, bits, 'mse').scale)


def _objective(
    model: nn.Module, batches: Iterable[Any], search: ScaleSearch, forward: Forward
) -> Callable[[nn.Module, Any], Tensor]:
    """The loss of logits that ``search.objective`` names."""
    generator = torch.Generator().manual_seed(0)
    if search.objective == 'quantized_kl':
        with weights_rounded(model), torch.no_grad():
            targets = iter([_logits(forward(model, batch)) for batch in bounded(batches, search.images)])
        return lambda model, batch: quantized_kl(_logits(forward(model, batch)), next(targets))
    of_logits = fisher if search.objective == 'fisher' else perturbed_kl
    return lambda model, batch: of_logits(_logits(forward(model, batch)), generator)


def _logits(output: Any) -> Tensor:
    if not isinstance(output, Tensor) or output.dim() != 2 or output.shape[1] < 2:
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise StageError(
            f"metric='hessian' needs logits (batch, classes), the model gives {shape}: pass loss=, or metric='mse'"
        )
    return output


def _search_layer(view: WeightView, bits: int, samples: list[Tensor], search: ScaleSearch) -> None:
    """Scales of a layer's weight, a row each, and of its input."""
    x, slopes = (torch.cat(samples[part::2]) for part in range(2))
    weight = slopes.square()
    exact = view.matrix().float()
    # Without the bias, which may not be the layer's own.
    target = x @ exact.t()
    quantizer, own = view.map.input, view.map.weight
    rounded = exact
    ratios = torch.linspace(search.smallest, search.largest, search.candidates).tolist()
    for _ in range(search.rounds):
        column = view.map.column_scale.expand(exact.shape[1])
        if own is not None and bits != FLOAT_BITS:
            found = x if quantizer is None else quantizer(x)
            largest = (exact * column).abs().amax(dim=1) / (2 ** (bits - 1) - 0.5)
            trials = [WeightScales(_positive(largest * ratio), None) for ratio in ratios]

            def errors(metric: Metric, trials=trials, found=found, column=column) -> Tensor:  # type: ignore[no-untyped-def]
                totals = []
                for trial in trials:
                    error = OutputError(metric, (exact.shape[0],))
                    error.add((found @ at_scales(exact, column, trial, bits).t())[None], target, weight)
                    totals.append(error.total())
                return torch.cat(totals)

            scales = torch.stack([trial.scale for trial in trials])
            own.propose(scales.gather(0, _least(errors, search, ratios))[0])
            rounded = at_scales(exact, column, WeightScales(own.scale, None), bits)
        if quantizer is None or not quantizer.enabled:
            return
        transposed, before = rounded.t(), quantizer.scale.detach().clone()
        _choose(quantizer, [_Call(x, lambda values, w=transposed: values @ w, target, weight)], search, shared=True)  # type: ignore[misc]
        if own is not None and own.folded:
            # Scales of folded weights: one factor for all columns, so the weight itself stays as it was rounded.
            own.scale.mul_((quantizer.scale / before).detach().reshape(-1)[0])


def _search_product(product: QuantizedProduct, samples: list[Tensor], search: ScaleSearch) -> None:
    """Scales of both operands, one operand after the other."""
    if product.einsum:
        # Which axes are rows and columns is the equation's secret: the scales stay as they were calibrated.
        return
    groups = [samples[start : start + 4] for start in range(0, len(samples), 4)]
    left, right = product.operands
    for _ in range(search.rounds):
        if left.enabled:
            _choose(left, [_left_call(x, other, y, slope, right) for x, other, y, slope in groups], search)
        if right.enabled:
            _choose(right, [_right_call(other, x, y, slope, left) for other, x, y, slope in groups], search)


class _Call(NamedTuple):
    """Values that a quantizer rounds, what is computed from them, and what should come out."""

    values: Tensor
    compute: Callable[[Tensor], Tensor]
    target: Tensor
    weight: Tensor


def _left_call(left: Tensor, right: Tensor, y: Tensor, slope: Tensor, other: Quantizer) -> _Call:
    fixed = other(right)
    return _Call(left, lambda values: values @ fixed, y, slope.square())


def _right_call(left: Tensor, right: Tensor, y: Tensor, slope: Tensor, other: Quantizer) -> _Call:
    fixed = other(left)
    return _Call(right, lambda values: fixed @ values, y, slope.square())


def _choose(quantizer: Quantizer, calls: list[_Call], search: ScaleSearch, *, shared: bool = False) -> None:
    """Give a quantizer the candidate of least error: a head or output column each its own, or one for all.

    Args:
        quantizer: calibrated.
        calls: what the error is taken over.
        search: metric and candidates.
        shared: scales run along the summed axis, so that one factor is chosen for all.
    """
    if quantizer.offset is not None or isinstance(quantizer, RowQuantizer):
        # Its steps lie where calibration put them: another scale would move them all, or clip each row's largest value.
        return
    trials, ratios = _trials(quantizer, calls, search, shared)
    shape = (1,) if shared else quantizer.shape
    size = max(1, max(call.target.numel() for call in calls))

    def errors(metric: Metric) -> Tensor:
        totals = []
        for part in trials.split(max(1, _CHUNK // size)):
            error = OutputError(metric, shape)
            for call in calls:
                found = call.compute(part.round(quantizer, call.values))
                error.add(_split(quantizer, found, 1), _split(quantizer, call.target), _split(quantizer, call.weight))
            totals.append(error.total())
        return torch.cat(totals)

    trials.settle(quantizer, _least(errors, search, ratios))


def _least(errors: Callable[[Metric], Tensor], search: ScaleSearch, ratios: Sequence[float]) -> Tensor:
    """Number of the candidate of least error, ``(1, *shape)``.

    Where the metric finds none better than another, as behind units that no sample reaches, the squared error decides;
    where that does not either, the candidate that represents the largest value.
    """
    found = errors(search.metric)
    best = found.argmin(dim=0, keepdim=True)
    open_still = found.amax(dim=0, keepdim=True) == found.amin(dim=0, keepdim=True)
    if bool(open_still.any()):
        squared = errors('mse')
        nothing = squared.amax(dim=0, keepdim=True) == squared.amin(dim=0, keepdim=True)
        whole = min(range(len(ratios)), key=lambda number: abs(ratios[number] - 1))
        second = squared.argmin(dim=0, keepdim=True).masked_fill(nothing, whole)
        best = torch.where(open_still, second, best)
    return best


def _split(quantizer: Quantizer, x: Tensor, lead: int = 0) -> Tensor:
    """Heads that are merged into the batch in an axis of their own."""
    heads = quantizer.merged_heads
    return x.reshape(*x.shape[:lead], -1, heads, *x.shape[lead + 1 :]) if heads else x


class _Trials(NamedTuple):
    """Candidates of a quantizer: ``(candidates, *shape)`` each."""

    scale: Tensor
    shift: Tensor

    def split(self, size: int) -> list[_Trials]:
        starts = range(0, len(self.scale), size)
        return [_Trials(self.scale[start : start + size], self.shift[start : start + size]) for start in starts]

    def round(self, quantizer: Quantizer, values: Tensor) -> Tensor:
        """``(candidates, *values.shape)``."""
        x = _split(quantizer, values)
        wide = (1,) * (x.dim() - len(quantizer.shape)) + quantizer.shape
        scale, shift = (t.reshape(len(t), *wide) for t in self)
        spec = quantizer.spec
        if isinstance(quantizer, TwoPartQuantizer):
            rounded = steps_of_parts(parts_of(x, TwoPartScale(scale, shift), spec)) * scale
        else:
            rounded = dequantize(quantize(x, scale, spec.qmin, spec.qmax), scale)
        return rounded.reshape(len(scale), *values.shape)

    def settle(self, quantizer: Quantizer, best: Tensor) -> None:
        """Take the candidates ``best``, ``(1, *shape)`` or one for all."""
        index = best.expand(1, *quantizer.shape)
        scale, shift = self.scale.gather(0, index)[0], self.shift.gather(0, index)[0]
        quantizer.initialize(
            scale, None, signed=bool(quantizer.spec.signed), elements=float(quantizer.elements_per_scale)
        )
        if isinstance(quantizer, TwoPartQuantizer):
            quantizer.set_shift(shift)


def _trials(
    quantizer: Quantizer, calls: list[_Call], search: ScaleSearch, shared: bool
) -> tuple[_Trials, Sequence[float]]:
    """Candidates, and each one's share of the scale that represents the largest value."""
    spec, shape = quantizer.spec, quantizer.shape
    ends = [torch.aminmax(quantizer.groups(call.values), dim=1) for call in calls]
    low = torch.stack([end.min for end in ends]).amin(dim=0)
    high = torch.stack([end.max for end in ends]).amax(dim=0)
    if isinstance(quantizer, TwoPartQuantizer):
        found = list(candidates(low, high, spec))
        scale, shift = (torch.stack([one[part] for one in found]) for part in range(2))
        # Each represents the largest value; they differ in how much is left for the small ones.
        return _Trials(scale.reshape(-1, *shape), shift.reshape(-1, *shape)), [1.0] * len(found)
    # As the released code has it: the largest value is half a step beyond the last code's.
    needed = high.clamp(min=0) / (spec.qmax + 0.5)
    if spec.qmin < 0:
        needed = torch.maximum(needed, low.clamp(max=0) / (spec.qmin - 0.5))
    needed = needed.reshape(shape)
    if shared:
        # Channels that are always zero need nothing, and have no say.
        now = quantizer.scale.detach()
        needed = now * _positive((needed / now).amax())
    ratios = torch.linspace(search.smallest, search.largest, search.candidates)
    scale = ratios.to(needed).reshape(-1, *(1,) * len(shape)) * _positive(needed)
    return _Trials(scale, torch.zeros_like(scale)), ratios.tolist()


def _positive(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, scale, torch.ones_like(scale))
