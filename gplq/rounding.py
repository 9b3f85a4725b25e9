"""Round one weight in place, with its input's scales folded in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gplq.column_statistics import ColumnStatistics
from gplq.coordinate_descent import descend
from gplq.error_feedback import damped, round_with_feedback
from gplq.errors import StageError
from gplq.journal import Journal
from gplq.layers import WeightView
from gplq.recipe import Recipe
from gplq.record import weight_views
from gplq.spec import FLOAT_BITS
from gplq.weights import WeightScales, choose_weight_scales, restore_weight, round_weight

__all__ = ['at_scales', 'nearest', 'note', 'once', 'recalled', 'round_view', 'weights_rounded']


@torch.no_grad()
def once(journal: Journal | None, step: str, view: WeightView, work: Callable[[], None]) -> None:
    """Do what changes one weight and its map, unless the journal knows how that ended."""
    if not recalled(journal, f'{step} {view.name}', [view]):
        work()
        note(journal, f'{step} {view.name}', [view])


@torch.no_grad()
def note(journal: Journal | None, step: str, views: Sequence[WeightView]) -> None:
    """Write down how a step left weights and their maps."""
    if journal is not None:
        states = (_state(view).items() for view in views)
        journal.note(step, {f'{number}.{key}': t for number, state in enumerate(states) for key, t in state})


@torch.no_grad()
def recalled(journal: Journal | None, step: str, views: Sequence[WeightView]) -> bool:
    """Bring weights and their maps to where a step left them; False where the journal does not know."""
    known = None if journal is None else journal.recall(step)
    if known is None:
        return False
    for number, view in enumerate(views):
        own = f'{number}.'
        _restore(view, {key.removeprefix(own): t for key, t in known.items() if key.startswith(own)})
    return True


def _state(view: WeightView) -> dict[str, Tensor]:
    """One weight and its map."""
    own = {f'map.{key}': tensor for key, tensor in view.map.state_dict().items()}
    return {'weight': view.matrix(), 'corrected': torch.tensor(view.map.corrected), **own}


def _restore(view: WeightView, known: dict[str, Tensor]) -> None:
    """Bring one weight and its map to a state."""
    view.write(known.pop('weight').to(view.matrix()))
    view.map.corrected = bool(known.pop('corrected'))
    if view.map.weight is not None:
        view.map.weight.forget_learning()
    view.map.load_state_dict({key.removeprefix('map.'): tensor for key, tensor in known.items()})
    if view.map.weight is not None:
        view.map.weight.enabled = True


@torch.no_grad()
def round_view(
    view: WeightView, recipe: Recipe, statistics: ColumnStatistics | None, matrix: Tensor | None = None
) -> None:
    """Choose scales for a weight, round it, write it back, and set the bias that this calls for.

    The mean of what rounding takes from the output, and an input offset's exact share of it, are constants: they
    go into the bias and cost nothing.

    Args:
        view: the weight.
        recipe: scheme of the scales and kind of rounding.
        statistics: of what the weight multiplies; None rounds to nearest without weighing columns.
        matrix: rounded instead of the present weight, ``(rows, columns)``.
    """
    quantizer = view.map.weight
    assert quantizer is not None
    bits = quantizer.spec.bits
    # In FP32 whatever the model is in: a saved file restores these values from codes and FP32 scales.
    exact = (view.matrix() if matrix is None else matrix).float().clone()
    column_scale = view.map.column_scale.expand(exact.shape[1])
    folded = exact * column_scale
    moments, energy = _moments(recipe, statistics)
    importance = None if energy is None else energy / column_scale.square()
    learned = quantizer.learning
    if learned:
        scales = quantizer.settle_learning(column_scale)
    elif recipe.weight_scheme == 'searched':
        # Convolutions, whose input has one scale, are not searched.
        if not quantizer.proposed and not isinstance(view.owner, nn.Conv2d):
            raise StageError(f"{view.name}: weight_scheme='searched', but nothing was: call gplq.search_scales first")
        scales = quantizer.scales if quantizer.proposed else choose_weight_scales(folded, bits, 'mse', importance)
    else:
        scales = choose_weight_scales(folded, bits, recipe.weight_scheme, importance)
    if moments is not None:
        gram = moments / torch.outer(column_scale, column_scale)
        values = round_with_feedback(folded, scales, bits, gram)
        if recipe.rounding == 'descent':
            values = descend(folded, values, scales, bits, damped(gram))
    else:
        values = restore_weight(round_weight(folded, scales, bits), scales)
    rounded = quantizer.keep(values, column_scale, scales)
    view.write(rounded)
    if view.matrix().dtype != torch.float32:
        # Few digits can make a large code the next one; what that stands for is its own nearest.
        rounded = quantizer.restore(quantizer.codes(view.matrix(), column_scale), column_scale)
        view.write(rounded)
    # Training has seen the rounded weight already.
    mean = None if learned else _mean(view, recipe, statistics, exact)
    if mean is not None:
        view.map.bias_correction.copy_((exact - rounded) @ mean)
        view.map.corrected = True


def nearest(view: WeightView, bits: int) -> Tensor:
    """The weight ``(rows, columns)`` rounded to nearest by least squared error, with its input's scales folded in."""
    matrix = view.matrix().float()
    column = view.map.column_scale.expand(matrix.shape[1])
    return at_scales(matrix, column, choose_weight_scales(matrix * column, bits, 'mse'), bits)


def at_scales(matrix: Tensor, column: Tensor, scales: WeightScales, bits: int) -> Tensor:
    """A weight ``(rows, columns)`` rounded to nearest with its input's scales ``(columns,)`` folded in."""
    return restore_weight(round_weight(matrix * column, scales, bits), scales) / column


@contextmanager
def weights_rounded(model: nn.Module, names: Callable[[str], bool] = lambda name: True) -> Iterator[None]:
    """Weights of the chosen names rounded to nearest, for as long as the context lasts."""
    exact = []
    try:
        for plan, view in weight_views(model):
            if plan.weight_bits != FLOAT_BITS and names(view.name):
                exact.append((view, view.matrix().clone()))
                view.write(nearest(view, plan.weight_bits))
        yield
    finally:
        for view, matrix in exact:
            view.write(matrix)


def _moments(recipe: Recipe, statistics: ColumnStatistics | None) -> tuple[Tensor | None, Tensor | None]:
    """What the errors of columns together, and each column's by itself, are weighed by.

    Errors that a constant input makes go into the bias, so descent leaves inputs' means out; GPTQ does not.
    """
    if statistics is None:
        return None, None
    if not recipe.uses_statistics:
        return None, statistics.mean_square
    if recipe.rounding == 'feedback':
        return statistics.gram, statistics.mean_square
    covariance = statistics.covariance
    if covariance is None:
        return None, statistics.mean_square
    return covariance, (covariance.diagonal().clamp(min=0) / max(statistics.count, 1)).float()


def _mean(view: WeightView, recipe: Recipe, statistics: ColumnStatistics | None, exact: Tensor) -> Tensor | None:
    """Mean input, or what is known of it without statistics.

    That is how far a channel's offset is from the mean offset (RepQ-ViT eq. 10: its share is computed with the weight
    before rounding). The mean offset itself is left out: codes are counted from it, and inputs lie around zero, not
    around their smallest value. It holds where a scale is its own channel's range: scales that are chosen for the
    weights too make offsets of their own, which say nothing of the inputs' means.
    """
    if statistics is not None:
        return statistics.mean
    if view.map.input is None or view.map.input.offset is None or not recipe.scales_are_ranges:
        return None
    offset = view.map.input.offset.detach()
    return (view.map.input.scale.detach() * (offset - offset.mean())).expand(exact.shape[1])
