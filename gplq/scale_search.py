"""PTQ4ViT's search: weight and activation scales in turn, by what their rounding does to the layer's output."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import Tensor, nn

from gplq.batches import Forward, bounded, default_forward, rereadable
from gplq.distributed import failing_together, maximum, minimum
from gplq.errors import RecipeError, StageError
from gplq.layers import WeightView
from gplq.objectives import Objective, fisher, perturbed_kl, quantized_kl
from gplq.output_error import Metric, OutputError, least
from gplq.products import QuantizedProduct
from gplq.progress import Progress, no_progress
from gplq.quantizer import Quantizer
from gplq.record import Stage, as_meant, named_products, record_of, weight_views
from gplq.rounding import at_scales, weights_rounded
from gplq.row_quantizer import RowQuantizer
from gplq.sample_store import SampleStore
from gplq.scale_trials import positive, trials_of
from gplq.site_call import SiteCall
from gplq.site_samples import collect_samples
from gplq.spec import FLOAT_BITS
from gplq.trace import evaluating
from gplq.typecheck import check_types
from gplq.weights import WeightScales, choose_weight_scales

__all__ = ['ScaleSearch', 'search_scales']

_log = logging.getLogger(__name__)


# What the inner caches of a processor hold: several times faster than one call over all candidates.
_CACHED = 2**22


@dataclass(frozen=True)
class ScaleSearch:
    """Settings of the search (PTQ4ViT sec. 3.3 and its released code).

    Attributes:
        metric: of the output's error.
        objective: whose gradients weigh it, see :mod:`gplq.objectives`; a task's own loss takes its place.
        rounds: how often weight and activation, or both operands of a product, take turns, at most: none would find
            anything else once one has been left as it was.
        candidates: scales that are tried for each in a turn, evenly from ``smallest`` to ``largest``; quantizers of two
            parts have candidates of their own (:func:`gplq.two_part.candidates`).
        smallest: as a share of the scale that represents the largest value.
        largest: likewise.
        images: that are run to find inputs, outputs and gradients.
        vectors: inputs of a layer that the error is taken over.
        maps: images or windows of a product likewise.
        rows: of each of these, where it has more: a map of attention has as many as there are tokens.
        memory_mb: that samples and the search over them take. Half is for samples that wait, more of them lie in
            temporary files; a quarter is for those of one site, of which fewer are kept where they have more; a
            quarter for the candidates. The forward and backward pass of a batch comes on top.
        folder: of the temporary files; None takes the system's.
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
    rows: int = 256
    memory_mb: float = 2048.0
    folder: str | None = None

    def __post_init__(self) -> None:
        check_types(vars(self), get_type_hints(ScaleSearch))
        for name in ('rounds', 'candidates', 'images', 'vectors', 'maps', 'rows'):
            if getattr(self, name) < 1:
                raise RecipeError(f'{name}={getattr(self, name)} must be at least 1')
        if not 0 < self.smallest < self.largest:
            raise RecipeError(f'smallest={self.smallest} must be above 0 and below largest={self.largest}')
        if not self.memory_mb > 0:
            raise RecipeError(f'memory_mb={self.memory_mb} must be above 0')
        if self.folder is not None and not Path(self.folder).is_dir():
            raise RecipeError(f"folder={self.folder} is no folder: make it, or leave it out for the system's")

    @property
    def ratios(self) -> list[float]:
        """Candidates as shares of the scale that represents the largest value."""
        return torch.linspace(self.smallest, self.largest, self.candidates).tolist()

    @property
    def share(self) -> float:
        """Bytes of a quarter of the budget."""
        return self.memory_mb * 2**18

    def at_once(self, device: torch.device) -> float:
        """Bytes of candidates that are worked on at once: on a CPU no more than stays in its caches."""
        return min(self.share, _CACHED) if device.type == 'cpu' else self.share


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

    Where the activation stage has trained the activations, their scales stay and weights alone are searched, for what
    the model computes with its activations quantized. The weights are not rounded yet: :func:`gplq.quantize_weights`
    does that with the scales found, where the recipe has ``weight_scheme='searched'``. Inputs of convolutions, and
    products that are an einsum, keep the scales that calibration gave them.

    Args:
        model: calibrated.
        batches: calibration data; ``search.images`` are read. Each rank has its own, all find the same.
        search: settings.
        loss: task loss of ``(model, batch)`` whose gradients weigh the errors, such as a detector's; None takes
            ``search.objective`` of what ``forward`` returns, logits ``(batch, classes)``.
        forward: runs one batch.
        progress: wraps an iterable to show how far it is.

    Raises:
        StageError: if the model is not calibrated, or an objective needs logits and there are none.
        CalibrationError: if batches are missing, empty or not finite.
    """
    trained = record_of(model, Stage.CALIBRATED).trained
    search = search or ScaleSearch()
    batches = rereadable(batches, search.images)
    if search.metric == 'hessian' and loss is None and search.objective == 'quantized_kl':
        # Run twice, in the same order: a loader that shuffles would compare one image with another.
        batches = list(bounded(batches, search.images))
    with SampleStore(search.memory_mb / 2, search.folder) as store, evaluating(model):
        if search.metric != 'hessian':
            loss = None
        elif loss is None:
            loss = _objective(model, batches, search, forward)
        with as_meant(model), failing_together():
            samples = collect_samples(
                model,
                batches,
                loss,
                forward,
                store,
                images=search.images,
                vectors=search.vectors,
                maps=search.maps,
                rows=search.rows,
                site_mb=search.memory_mb / 4,
                products=not trained,
                progress=progress,
            )
        layers = {view.name: (view, plan.weight_bits) for plan, view in weight_views(model)}
        products = {} if trained else dict(named_products(model))
        names = [*layers, *products]
        # Some images may not reach a site, and so not on every rank.
        reached = torch.tensor([float(name in samples) for name in names], device=next(model.parameters()).device)
        maximum(reached)
        for name in progress([name for name, found in zip(names, reached.tolist(), strict=True) if found], 'search'):
            groups = samples.take(name) if name in samples else []
            if name in layers:
                _search_layer(*layers.pop(name), groups, search, trained)
            else:
                _search_product(products[name], groups, search)
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


def _search_layer(view: WeightView, bits: int, groups: list[list[Tensor]], search: ScaleSearch, trained: bool) -> None:
    """Scales of a layer's weight, a row each, and of its input."""
    exact = view.matrix().float()
    nothing = exact.new_zeros(0, exact.shape[1]), exact.new_zeros(0, exact.shape[0])
    x, slopes = (torch.cat([group[part] for group in groups] or [nothing[part]]) for part in range(2))
    weight = slopes.square()
    # Without the bias, which may not be the layer's own.
    target = x @ exact.t()
    quantizer, own = view.map.input, view.map.weight
    rounded = exact
    # One side alone is settled in one turn.
    for _ in range(1 if trained else search.rounds):
        column = view.map.column_scale.expand(exact.shape[1])
        if own is not None and bits != FLOAT_BITS:
            # Trained inputs have come as they are quantized.
            found = x if quantizer is None or trained else quantizer(x)
            scales = _weight_scales(exact, column, bits, found, target, weight, search)
            own.propose(scales.scale)
            rounded = at_scales(exact, column, scales, bits)
        if trained or quantizer is None or not quantizer.enabled:
            return
        before = quantizer.scale.detach().clone()
        if not _choose(quantizer, [SiteCall(x, rounded.t(), True, target, weight)], search, shared=True):
            return
        if own is not None and own.folded:
            # Scales of folded weights: one factor for all columns, so the weight itself stays as it was rounded.
            own.scale.mul_((quantizer.scale / before).detach().reshape(-1)[0])


def _weight_scales(
    exact: Tensor, column: Tensor, bits: int, found: Tensor, target: Tensor, weight: Tensor, search: ScaleSearch
) -> WeightScales:
    """The candidate of least error of each row."""
    ratios = search.ratios
    largest = positive((exact * column).abs().amax(dim=1) / (2 ** (bits - 1) - 0.5))
    scales = torch.tensor(ratios).to(largest)[:, None] * largest

    def errors(metric: Metric) -> Tensor:
        error = OutputError(metric, len(ratios), (len(exact),), exact.device)
        # Each candidate has its matrix and its outputs.
        room = search.at_once(exact.device) / 2
        count = max(1, int(room / (12.0 * exact.numel())))
        step = max(1, int(room / (12.0 * count * len(exact))))
        for first in range(0, len(ratios), count):
            matrices = at_scales(exact, column, WeightScales(scales[first : first + count], None), bits)
            for start in range(0, len(found), step):
                rows = slice(start, start + step)
                error.add(found[rows] @ matrices.transpose(1, 2), target[rows], weight[rows], first)
        error.pool()
        return error.total()

    return WeightScales(scales.gather(0, least(errors, search.metric, ratios))[0], None)


def _search_product(product: QuantizedProduct, groups: list[list[Tensor]], search: ScaleSearch) -> None:
    """Scales of both operands, one operand after the other."""
    left, right = product.operands
    for _ in range(search.rounds):
        if left.enabled:
            _choose(left, [SiteCall(x, right(z), True, y, slope.square()) for x, z, y, slope in groups], search)
        if not right.enabled:
            return
        calls = [SiteCall(z, left(x), False, y, slope.square()) for x, z, y, slope in groups]
        if not _choose(right, calls, search):
            return


def _choose(quantizer: Quantizer, calls: Sequence[SiteCall], search: ScaleSearch, *, shared: bool = False) -> bool:
    """Give a quantizer the candidate of least error: a head or output column each its own, or one for all.

    Args:
        quantizer: calibrated.
        calls: what the error is taken over.
        search: metric and candidates.
        shared: scales run along the summed axis, so that one factor is chosen for all.

    Returns:
        Whether that is another than it had. Where it is not, what has the next turn was found beside it already, and
        further rounds would repeat the last.
    """
    if quantizer.offset is not None or isinstance(quantizer, RowQuantizer):
        # Its steps lie where calibration put them: another scale would move them all, or clip each row's largest value.
        return False
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    low, high = _ends(quantizer, calls)
    trials = trials_of(quantizer, low, high, search.ratios, shared)
    shape = (1,) if shared else quantizer.shape
    total = len(trials.ratios)

    def errors(metric: Metric) -> Tensor:
        error = OutputError(metric, total, shape, low.device)
        room = search.at_once(low.device)
        for call in calls:
            for piece in call.pieces(room, quantizer.merged_heads):
                count = max(1, int(room / piece.cost))
                target, weight = (quantizer.split_heads(x) for x in (piece.target, piece.weight))
                for first in range(0, total, count):
                    found = piece.output(trials.round(quantizer, piece.values, first, count))
                    error.add(found.reshape(-1, *target.shape), target, weight, first)
        error.pool()
        return error.total()

    trials.settle(quantizer, least(errors, search.metric, trials.ratios))
    return any(not torch.equal(value, before[name]) for name, value in quantizer.state_dict().items())


def _ends(quantizer: Quantizer, calls: Sequence[SiteCall]) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of each scale, over all ranks."""
    low = torch.full_like(quantizer.log_scale.detach().flatten(), torch.inf)
    high = -low
    for call in calls:
        if call.values.numel():
            seen = torch.aminmax(quantizer.groups(call.values), dim=1)
            low, high = torch.minimum(low, seen.min), torch.maximum(high, seen.max)
    return minimum(low), maximum(high)
