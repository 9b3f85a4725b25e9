"""Initialize every activation quantizer from calibration data."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from gplq.batches import Forward, batch_size, bounded, default_forward, rereadable
from gplq.distributed import failing_together, total
from gplq.equalize import equalize_queries_and_keys
from gplq.errors import CalibrationError
from gplq.exponent import search_input_scale
from gplq.layers import WeightView
from gplq.observers import MinMaxObserver, MSEObserver, Observer, make_observer
from gplq.observers.vectors import VectorObserver
from gplq.plan import MapPlan
from gplq.progress import Progress, no_progress
from gplq.quantizer import Quantizer
from gplq.recipe import Recipe
from gplq.record import Stage, floating_point, named_products, named_quantizers, record_of, weight_views
from gplq.row_quantizer import RowQuantizer
from gplq.spec import QuantizerSpec
from gplq.trace import evaluating
from gplq.two_part import TwoPartQuantizer, propose
from gplq.weight_training import forget_proposals, start_weight_training

__all__ = ['calibrate']

_log = logging.getLogger(__name__)

# What is kept of a linear layer's inputs: a thousandth of a channel's values is to be some of them.
_VECTORS = {'min_max': 512, 'percentiles': 4096}


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Forward = default_forward,
    progress: Progress = no_progress,
) -> None:
    """Choose scale, offset and sign of every activation quantizer, then switch all of them on.

    The model runs in inference mode and floating point, the training's random state is left alone. Queries and
    keys are evened out first where that is exact (``recipe.equalize``). Calibrating again starts from the plan,
    signs included.

    Args:
        model: prepared.
        batches: tensors, ``(inputs, labels)`` or mappings; ``recipe.calibration_samples`` samples are read at most.
            They are read more than once: what an iterator gives is kept in memory.
        forward: runs one batch.
        progress: wraps an iterable to show how far it is.

    Raises:
        CalibrationError: if batches are missing, empty or not finite, or a site is never reached.
    """
    record = record_of(model, Stage.PREPARED, Stage.CALIBRATED)
    recipe = record.plan.recipe
    batches = rereadable(batches, recipe.calibration_samples)
    with evaluating(model), floating_point(model):
        if recipe.equalize:
            count = equalize_queries_and_keys(model, batches, forward)
            if count:
                _log.info('queries and keys evened out in %d attention modules', count)
        with _observing(model, recipe):
            with failing_together():
                samples = 0
                for batch in progress(bounded(batches, recipe.calibration_samples), 'calibrate'):
                    _run(model, batch, forward)
                    samples += batch_size(batch)
            observers = {}
            device = next(model.parameters()).device
            for name, quantizer in named_quantizers(model):
                assert quantizer.observer is not None
                observers[name] = quantizer.observer
                quantizer.observer.pool(quantizer.log_scale.numel(), device)
            samples = int(total(torch.tensor(samples, dtype=torch.long, device=device)))
    settled = {name: _with_sign(name, plan.spec, observers[name]) for name, plan in record.plan.operands().items()}
    for plan, view in progress(weight_views(model), 'input scales'):
        if view.map.input is not None:
            name = f'{plan.name}:{plan.kind}'
            _settle_input(name, plan, view, view.map.input, settled[name], observers[name], recipe, samples)
    for name, product in named_products(model):
        for site, quantizer in zip(product.sites, product.operands, strict=True):
            _settle(quantizer, settled[f'{name}:{site}'], observers[f'{name}:{site}'], samples)
    forget_proposals(model)
    start_weight_training(model)
    record.stage = Stage.CALIBRATED
    record.trained = False


def _run(model: nn.Module, batch: Any, forward: Forward) -> None:
    try:
        forward(model, batch)
    except CalibrationError:
        raise CalibrationError(
            'a layer was given values that are not finite: ' + _first_broken(model) + '; check the checkpoint'
        ) from None


def _first_broken(model: nn.Module) -> str:
    """Names a module with a parameter that is not finite, if that is the cause."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not bool(parameter.isfinite().all()):
            return f'parameter {name} holds NaN or infinite values'
    return 'no parameter is at fault, so the input scale is'


@contextmanager
def _observing(model: nn.Module, recipe: Recipe) -> Iterator[None]:
    vectors = {f'{plan.name}:{plan.kind}' for plan, _ in weight_views(model)}
    quantizers = list(named_quantizers(model))
    for name, quantizer in quantizers:
        if isinstance(quantizer, TwoPartQuantizer):
            quantizer.observer = MSEObserver()
        elif isinstance(quantizer, RowQuantizer):
            # Of its values only sign and number count, so no sample is kept.
            quantizer.observer = MinMaxObserver()
        elif name not in vectors:
            quantizer.observer = make_observer(recipe.product_observer)
        elif quantizer.spec.granularity == 'channel':
            quantizer.observer = VectorObserver(_VECTORS[recipe.channel_ranges])
        else:
            quantizer.observer = make_observer(recipe.linear_observer)
    try:
        yield
    finally:
        for _, quantizer in quantizers:
            quantizer.observer = None


def _settle_input(
    name: str,
    plan: MapPlan,
    view: WeightView,
    quantizer: Quantizer,
    spec: QuantizerSpec,
    observer: Observer,
    recipe: Recipe,
    samples: int,
) -> None:
    if not isinstance(observer, VectorObserver):
        _settle(quantizer, spec, observer, samples)
        return
    ranges = observer.seen if recipe.channel_ranges == 'min_max' else observer.percentiles(spec)
    found = search_input_scale(observer.vectors(), ranges, view.matrix().float(), spec, plan.weight_bits, recipe)
    _log.debug('%s: exponent %g, clip %g, balanced %s', name, found.exponent, found.clip, found.balanced)
    quantizer.initialize(found.scale, found.offset, signed=bool(spec.signed), elements=observer.elements / samples)


def _settle(quantizer: Quantizer, spec: QuantizerSpec, observer: Observer, samples: int) -> None:
    if isinstance(quantizer, TwoPartQuantizer):
        assert isinstance(observer, MSEObserver)
        scale, shift = propose(observer.values(), *observer.seen, spec)
        quantizer.set_shift(shift)
        offset = None
    elif isinstance(quantizer, RowQuantizer):
        # A row's largest value is its last code: where attention is strongest it is not clipped.
        scale, offset = torch.full_like(quantizer.log_scale, 1 / spec.qmax), None
    else:
        scale, offset = observer.propose(spec)
    quantizer.initialize(scale, offset, signed=bool(spec.signed), elements=observer.elements / samples)


def _with_sign(name: str, planned: QuantizerSpec, observer: Observer) -> QuantizerSpec:
    """The planned spec with the sign that the values call for, where the plan leaves it open."""
    if observer.elements == 0:
        raise CalibrationError(f'{name} was never reached by the calibration batches; name it in skip')
    if planned.scheme == 'log_sqrt2' and observer.signed:
        raise CalibrationError(f"{name} has negative values, which have no logarithm: set attention_map='uniform'")
    return replace(planned, signed=observer.signed) if planned.signed is None else planned
