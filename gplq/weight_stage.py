"""GPLQ's second stage: freeze the activations, fold their scales into the weights, round, compensate."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from gplq.batches import Forward, bounded, default_forward
from gplq.compensation import compensate
from gplq.errors import StageError
from gplq.layers import WeightView
from gplq.progress import Progress, no_progress
from gplq.record import Stage, map_of, named_quantizers, record_of, weight_views
from gplq.rounding import round_view
from gplq.spec import FLOAT_BITS
from gplq.trace import evaluating

__all__ = ['quantize_weights']

_log = logging.getLogger(__name__)


def quantize_weights(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    *,
    forward: Forward = default_forward,
    progress: Progress = no_progress,
) -> None:
    """Round every targeted weight; cannot be undone.

    Activation quantizers are frozen first. Each weight is rounded with its input's scales folded in, per output
    channel (GPLQ sec. 3.2.2), so that the integer product of the codes is the product that was evaluated. Then
    the recipe's compensation is fitted to the outputs of the model before rounding.

    Args:
        model: calibrated, and usually trained by the activation stage.
        batches: calibration data as for :func:`gplq.calibrate`; may be None where the recipe compensates
            nothing and quantizes no activation.
        forward: runs one batch.
        progress: wraps an iterable to show how far it is.

    Raises:
        StageError: if activations are not calibrated.
        CalibrationError: if batches are needed and missing, empty or not finite.
    """
    record = record_of(model)
    recipe = record.plan.recipe
    if record.stage is Stage.PREPARED and any(True for _ in named_quantizers(model)):
        raise StageError(
            'the activation quantizers are not calibrated: call gplq.calibrate first '
            '(without gplq.train_activations this is plain post-training quantization)'
        )
    if record.stage is Stage.QUANTIZED:
        raise StageError('the weights are quantized already')
    for _, quantizer in named_quantizers(model):
        quantizer.requires_grad_(False)
    pending = [(plan, view) for plan, view in weight_views(model) if plan.weight_bits != FLOAT_BITS]
    if pending and recipe.compensation != 'none' and batches is None:
        raise StageError(f'compensation={recipe.compensation!r} needs calibration batches')
    batches = list(batches) if isinstance(batches, Iterator) else batches
    reference = None
    with evaluating(model):
        importance: dict[str, Tensor] = {}
        if pending and batches is not None:
            if recipe.compensation != 'none':
                reference = copy.deepcopy(model)
            importance = _importance(model, batches, forward, progress)
        for _, view in progress(pending, 'round weights'):
            round_view(view, recipe.weight_scheme, importance.get(view.name))
        if reference is not None and batches is not None:
            compensate(model, reference, batches, forward, progress)
    record.stage = Stage.QUANTIZED


class _MeanSquare:
    """Watches a linear map; mean square of each column of what its weight multiplies."""

    def __init__(self, view: WeightView) -> None:
        self.view = view
        self.total: Tensor | None = None
        self.count = 0

    def __call__(self, x: Tensor, y: Tensor) -> None:
        columns = self.view.matrix().shape[1]
        if x.shape[-1] != columns:
            # A convolution: its unfolded columns are too many to keep apart, and its input has one scale.
            return
        x = x.reshape(-1, columns)
        total = x.float().square().sum(0)
        self.total = total if self.total is None else self.total + total
        self.count += x.shape[0]


def _importance(model: nn.Module, batches: Iterable[Any], forward: Forward, progress: Progress) -> dict[str, Tensor]:
    watchers = {}
    for _, view in weight_views(model):
        if isinstance(view.owner, nn.Conv2d):
            continue
        watchers[view.name] = view.map.watcher = _MeanSquare(view)
    samples = record_of(model).plan.recipe.calibration_samples
    try:
        for batch in progress(bounded(batches, samples), 'weigh columns'):
            forward(model, batch)
    finally:
        for plan in record_of(model).plan.maps:
            map_of(model, plan).watcher = None
    return {name: w.total / max(w.count, 1) for name, w in watchers.items() if w.total is not None}
