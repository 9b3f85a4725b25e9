"""GPLQ's second stage: freeze the activations, fold their scales into the weights, round, compensate."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from gplq.batches import Forward, default_forward, rereadable, tensors_in
from gplq.column_statistics import ColumnStatistics, observe_columns
from gplq.compensation import compensate
from gplq.errors import StageError
from gplq.fingerprint import fingerprint
from gplq.independent_copy import independent_copy
from gplq.journal import Journal
from gplq.layernorm_folding import fold_into_layernorms
from gplq.progress import Progress, no_progress
from gplq.reconstruct import Reconstruction, reconstruct_blocks
from gplq.record import Stage, as_meant, named_quantizers, record_of, weight_views
from gplq.rounding import once, round_view
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
    journal: str | os.PathLike[str] | None = None,
    reconstruction: Reconstruction | None = None,
) -> None:
    """Round every targeted weight; cannot be undone.

    Activation quantizers are frozen first. Each weight is rounded with its input's scales folded in, per output
    channel (GPLQ sec. 3.2.2), so that the integer product of the codes is the product that was evaluated; then it
    is frozen, too, because an optimizer would move it off its grid. Last, the recipe's compensation is fitted to
    the outputs of the model before rounding: in floating point, or with its activations quantized where they were
    trained to be.

    Args:
        model: calibrated, and usually trained by the activation stage.
        batches: calibration data as for :func:`gplq.calibrate`; may be None where the recipe compensates
            nothing and quantizes no activation.
        forward: runs one batch.
        progress: wraps an iterable to show how far it is.
        journal: folder in which every finished layer and block is kept; a call that starts from the same model and
            first batch and finds it there goes on behind them.
        reconstruction: settings of the recipe's ``rounding='reconstruct'``.

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
    if pending and recipe.reads_batches and batches is None:
        raise StageError(
            f'rounding={recipe.rounding!r} and compensation={recipe.compensation!r} need calibration batches'
        )
    batches = None if batches is None else rereadable(batches, recipe.calibration_samples)
    reference = None
    kept = None
    reconstruction = reconstruction or Reconstruction()
    if journal is not None:
        first = {} if batches is None else tensors_in(next(iter(batches), None))
        start = {**model.state_dict(), **{f'batch {name}': tensor for name, tensor in first.items()}}
        kept = Journal(Path(journal), fingerprint(start, f'{record.plan.to_json()} {reconstruction}'))
    with evaluating(model), ExitStack() as stack:
        statistics: dict[str, ColumnStatistics] = {}
        if pending and batches is not None:
            if recipe.compensation != 'none':
                reference = independent_copy(model)
                stack.enter_context(as_meant(reference))
            if recipe.uses_statistics:
                statistics = observe_columns(model, batches, forward, progress)
        learned: frozenset[str] = frozenset()
        if recipe.rounding == 'reconstruct' and pending and batches is not None:
            learned = reconstruct_blocks(model, batches, reconstruction, forward, progress, kept)
        left = [(plan, view) for plan, view in pending if view.name not in learned]
        for _, view in progress(left, 'round weights'):
            found = statistics.pop(view.name, None)
            once(kept, 'round', view, partial(round_view, view, recipe, found))
        if reference is not None and batches is not None:
            compensate(model, reference, batches, forward, progress, kept)
        if recipe.fold_layernorm and pending:
            count = fold_into_layernorms(model)
            _log.info('input scales moved into %d LayerNorms', count)
    for _, view in pending:
        view.freeze()
    record.stage = Stage.QUANTIZED
