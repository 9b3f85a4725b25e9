"""While weights are rounded in training: bins are regularized, oscillations counted, settled weights held."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gplq.bin_regularization import bin_regularization, regularization_weight
from gplq.oscillation import OscillationCount
from gplq.record import weight_views
from gplq.spec import QuantizerSpec

__all__ = [
    'ConfidenceAnnealing',
    'Oscillations',
    'forget_proposals',
    'start_weight_training',
    'weight_regularization',
]


class _Trained(NamedTuple):
    """A weight that is rounded in training: the parameter, the same on its grid, the step of each row."""

    name: str
    matrix: Tensor
    folded: Tensor
    steps: Tensor
    spec: QuantizerSpec


def _learning(model: nn.Module) -> Iterator[_Trained]:
    """Every weight that is rounded in training."""
    for _, view in weight_views(model):
        quantizer = view.map.weight
        if quantizer is not None and quantizer.learning:
            matrix = view.trained_matrix()
            yield _Trained(view.name, matrix, *quantizer.on_grid(matrix, view.map.column_scale), quantizer.spec)


def forget_proposals(model: nn.Module) -> None:
    """Scales that a search proposed for the weights are void: the input scales folded into them change."""
    for _, view in weight_views(model):
        if view.map.weight is not None:
            view.map.weight.forget_proposal()


def start_weight_training(model: nn.Module) -> None:
    """Round the weights from now on, with steps of least squared error, in a model with ``train_weights``."""
    for _, view in weight_views(model):
        quantizer = view.map.weight
        if quantizer is not None and quantizer.log_scale is not None:
            quantizer.start_learning(view.matrix(), view.map.column_scale)


def weight_regularization(model: nn.Module, progress: float, largest: float, start: float = 0.25) -> Tensor:
    """Regularization of all weights that are rounded in training (VVTQ), with the factor for now; 0 if there are none.

    Args:
        model: in the activation stage, with ``train_weights``.
        progress: share of the training that is over, 0 to 1.
        largest: factor at the end.
        start: share of the training before it begins.
    """
    factor = regularization_weight(progress, largest, start)
    total = torch.zeros((), device=next(model.parameters()).device)
    if factor == 0:
        return total
    for weight in _learning(model):
        total = total + bin_regularization(weight.folded, weight.steps, weight.spec.lowest, weight.spec.qmax)
    return factor * total


class Oscillations:
    """Counts the weights of a model that go back and forth between two codes.

    Args:
        momentum: of the moving average of each weight's frequency.
    """

    def __init__(self, momentum: float = 0.01) -> None:
        self.momentum = momentum
        self.counts: dict[str, OscillationCount] = {}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Look at the codes after a step."""
        for weight in _learning(model):
            codes = (weight.folded / weight.steps[:, None]).round().clamp_(weight.spec.lowest, weight.spec.qmax)
            self.counts.setdefault(weight.name, OscillationCount(self.momentum)).update(codes)

    def share(self, threshold: float = 0.005) -> float:
        """How many of all weights, as a fraction, oscillate more often than ``threshold`` a step."""
        found = [count.frequency for count in self.counts.values() if count.frequency is not None]
        total = sum(frequency.numel() for frequency in found)
        return sum(int((frequency > threshold).sum()) for frequency in found) / total if total else 0.0


class ConfidenceAnnealing:
    """Lets only weights near a boundary between two codes go on learning (OFQ's confidence-guided annealing).

    Those move back and forth because the others do; with the others held they settle. A step of the optimizer would
    move a held weight by its momentum, so its value is put back behind the step.

    Args:
        model: in the activation stage, with ``train_weights``.
        boundary: distance in steps within which a weight goes on.
    """

    def __init__(self, model: nn.Module, boundary: float = 0.005) -> None:
        self.model = model
        self.boundary = boundary
        self._held: list[tuple[Tensor, Tensor, Tensor]] = []

    @torch.no_grad()
    def before_step(self) -> None:
        """Choose the weights to hold, and remember their values."""
        self._held = []
        for weight in _learning(self.model):
            position = weight.folded / weight.steps[:, None]
            # Boundaries lie at the halves between codes; beyond the last codes there are none.
            nearest = position.floor() + 0.5
            between = (nearest > weight.spec.lowest) & (nearest < weight.spec.qmax)
            held = ~between | ((position - nearest).abs() > self.boundary)
            self._held.append((weight.matrix, weight.matrix.clone(), held))

    @torch.no_grad()
    def after_step(self) -> None:
        """Put the held weights back."""
        for matrix, before, held in self._held:
            matrix.copy_(torch.where(held, before, matrix))
        self._held = []
