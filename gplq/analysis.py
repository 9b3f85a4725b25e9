"""What quantization meets and does at every site of a prepared model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gplq.batches import Forward, bounded, default_forward
from gplq.layers import WeightView
from gplq.plan import MapPlan
from gplq.progress import Progress, no_progress
from gplq.quantizer import Quantizer
from gplq.record import Stage, named_products, named_quantizers, record_of, weight_views
from gplq.rounding import nearest, weights_rounded
from gplq.spec import FLOAT_BITS
from gplq.trace import evaluating
from gplq.variation import Distribution, Variation

__all__ = ['SiteReport', 'analyze', 'isolated']

_BINS = 128


@dataclass(frozen=True)
class SiteReport:
    """One activation site or weight.

    Attributes:
        name: the module, and of a product its site.
        kind: such as ``'linear_input'``, ``'query'`` or ``'weight'``.
        bits: of the site.
        distribution: of the values before they are rounded.
        sqnr: ten times the decimal logarithm of the values' mean square over the rounding error's; None where the
            values before rounding are no longer known.
        histogram: counts in equal bins from ``low`` to ``high``.
        low: the smallest value seen.
        high: the largest.
        grid: values of the codes of the median scale, from the least to the largest; empty for 8 bits.
        heads: mean absolute value in each head, where heads have scales of their own.
    """

    name: str
    kind: str
    bits: int
    distribution: Distribution
    sqnr: float | None
    histogram: tuple[int, ...]
    low: float
    high: float
    grid: tuple[float, ...]
    heads: tuple[float, ...] = ()


class _Seen:
    """Sums of one site over batches."""

    def __init__(self, *, on_maps: bool) -> None:
        self.on_maps = on_maps
        self.variation = Variation()
        self.signal = self.noise = 0.0
        self.ends = (math.inf, -math.inf)
        self.counts = torch.zeros(_BINS)
        self.heads: list[Tensor] = []

    def add(self, x: Tensor, y: Tensor, quantizer: Quantizer) -> None:
        if quantizer.spec.granularity == 'head':
            self.heads.append(quantizer.groups(x).abs().mean(dim=1).float().cpu())
        # Channels last: maps of convolutions have them second.
        self.variation.add(x.movedim(1, -1) if self.on_maps else x)
        self.signal += float(x.double().square().sum())
        self.noise += float((x.double() - y.double()).square().sum())
        self.ends = (min(self.ends[0], float(x.min())), max(self.ends[1], float(x.max())))

    def count(self, x: Tensor) -> None:
        self.counts += _counts(x, *self.ends)


def _counts(x: Tensor, low: float, high: float) -> Tensor:
    return torch.histc(x.float().cpu(), _BINS, low, high if high > low else low + 1)


def _decibels(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def analyze(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Forward = default_forward,
    samples: int = 64,
    progress: Progress = no_progress,
) -> list[SiteReport]:
    """Describe every activation site and weight, in the order of the forward pass.

    Activations are those of the model as it is, with all other sites quantized. Weights that are not rounded yet are
    compared with what rounding to nearest by least squared error makes of them.

    Args:
        model: calibrated, or quantized.
        batches: data; read twice, for the ends and for the histograms.
        forward: runs one batch.
        samples: to read.
        progress: wraps an iterable to show how far it is.

    Raises:
        StageError: if the model is not calibrated.
        CalibrationError: if there is no batch.
    """
    record = record_of(model, Stage.CALIBRATED, Stage.QUANTIZED)
    chosen = list(bounded(batches, samples))
    kinds = {name: plan.site for name, plan in record.plan.operands().items()}
    seen = {name: _Seen(on_maps=kinds[name] in ('conv_input', 'patch_embed_input')) for name in kinds}
    with evaluating(model), torch.no_grad():
        for step in ('add', 'count'):
            with _watching(model, seen, step):
                for batch in progress(chosen, 'analyze' if step == 'add' else 'histograms'):
                    forward(model, batch)
    reports = []
    for name, quantizer in named_quantizers(model):
        distribution = seen[name].variation.distribution()
        if distribution is not None:
            reports.append(_report(name, kinds[name], quantizer, seen[name], distribution))
    reports += [_weight_report(*pair) for pair in weight_views(model) if pair[0].weight_bits != FLOAT_BITS]
    return reports


@contextmanager
def _watching(model: nn.Module, seen: dict[str, _Seen], step: str) -> Iterator[None]:
    """Look at what goes into each quantizer and what comes out."""
    handles = []
    for name, quantizer in named_quantizers(model):

        def look(module: nn.Module, args: tuple[Any, ...], y: Tensor, site: _Seen = seen[name]) -> None:
            if step == 'add':
                assert isinstance(module, Quantizer)
                site.add(args[0], y, module)
            else:
                site.count(args[0])

        handles.append(quantizer.register_forward_hook(look))
    # With somebody watching, layers and products call their quantizers one by one.
    watched: list[Any] = [view.map for _, view in weight_views(model)] + [p for _, p in named_products(model)]
    for module in watched:
        module.watcher = lambda *tensors: None
    try:
        yield
    finally:
        for module in watched:
            module.watcher = None
        for handle in handles:
            handle.remove()


def _report(name: str, kind: str, quantizer: Quantizer, seen: _Seen, distribution: Distribution) -> SiteReport:
    spec = quantizer.spec
    grid: tuple[float, ...] = ()
    if spec.bits < 8 and spec.scheme == 'uniform' and quantizer.enabled:
        scale = float(quantizer.scale.detach().median())
        shift = 0.0 if quantizer.offset is None else float(quantizer.offset.detach().median())
        grid = tuple(scale * (code + shift) for code in range(spec.qmin, spec.qmax + 1))
    counts = tuple(int(count) for count in seen.counts)
    sqnr = _decibels(seen.signal, seen.noise)
    heads = tuple(torch.stack(seen.heads).mean(dim=0).tolist()) if seen.heads else ()
    return SiteReport(name, kind, spec.bits, distribution, sqnr, counts, *seen.ends, grid, heads)


@torch.no_grad()
def _weight_report(plan: MapPlan, view: WeightView) -> SiteReport:
    matrix = view.matrix().float()
    # Columns are the input's channels.
    found = Variation()
    found.add(matrix)
    distribution = found.distribution()
    assert distribution is not None
    sqnr = None
    if view.map.weight is not None and not view.map.weight.enabled:
        noise = (nearest(view, plan.weight_bits) - matrix).double().square().sum()
        sqnr = _decibels(float(matrix.double().square().sum()), float(noise))
    low, high = float(matrix.min()), float(matrix.max())
    counts = tuple(int(count) for count in _counts(matrix, low, high))
    return SiteReport(view.name, 'weight', plan.weight_bits, distribution, sqnr, counts, low, high, ())


@contextmanager
def isolated(model: nn.Module, names: Iterable[str], *, inverted: bool = False) -> Iterator[None]:
    """Quantize what lies in some modules alone, or everything but that; weights to nearest by least squared error.

    Args:
        model: calibrated, its weights not rounded yet.
        names: of modules, such as a block's; everything inside belongs to them.
        inverted: whether these modules are the ones left in floating point.

    Raises:
        StageError: if the model is not calibrated, or its weights are rounded already.
    """
    record_of(model, Stage.CALIBRATED)
    wanted = tuple(names)

    def inside(name: str) -> bool:
        mine = any(name == one or name.startswith((f'{one}.', f'{one}:')) for one in wanted)
        return mine != inverted

    enabled = [(quantizer, quantizer.enabled) for _, quantizer in named_quantizers(model)]
    try:
        for name, quantizer in named_quantizers(model):
            quantizer.enabled = inside(name)
        with weights_rounded(model, inside):
            yield
    finally:
        for quantizer, state in enabled:
            quantizer.enabled = state
