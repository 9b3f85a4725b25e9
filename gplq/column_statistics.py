"""What the weight stage needs to know of a layer's quantized inputs: second moments and means."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gplq.batches import Forward, bounded
from gplq.distributed import failing_together, total
from gplq.layers import WeightView
from gplq.progress import Progress
from gplq.record import record_of, weight_views

__all__ = ['ColumnStatistics', 'observe_columns']


# A Gram matrix of the 12,544 columns of a detection head takes 1.3 GB, and its factors several times that.
GRAM_COLUMNS = 4096


class ColumnStatistics:
    """Sums over the vectors ``x`` that a weight ``(rows, columns)`` multiplies.

    Attributes:
        squares: sum of ``x ** 2``, ``(columns,)``.
        gram: sum of ``x x^T``, ``(columns, columns)``; None above ``GRAM_COLUMNS``.
        total: sum of ``x``, ``(columns,)``.
        count: number of vectors.
    """

    def __init__(self, columns: int, device: torch.device) -> None:
        self.squares = torch.zeros(columns, dtype=torch.float64, device=device)
        self.gram = None
        if columns <= GRAM_COLUMNS:
            self.gram = torch.zeros(columns, columns, dtype=torch.float64, device=device)
        self.total = torch.zeros(columns, dtype=torch.float64, device=device)
        self.count = 0

    def add(self, x: Tensor) -> None:
        """Take in ``(..., columns)``."""
        x = x.reshape(-1, x.shape[-1]).float()
        self.squares += x.square().sum(0).double()
        if self.gram is not None:
            self.gram += (x.t() @ x).double()
        self.total += x.sum(0).double()
        self.count += x.shape[0]

    def __call__(self, x: Tensor, y: Tensor) -> None:
        self.add(x)

    def pool(self) -> None:
        """Take in what the other ranks have summed."""
        for sums in (self.squares, self.gram, self.total):
            if sums is not None:
                total(sums)
        self.count = int(total(torch.tensor(self.count, dtype=torch.long, device=self.squares.device)))

    @property
    def mean(self) -> Tensor:
        """``(columns,)``."""
        return (self.total / max(self.count, 1)).float()

    @property
    def covariance(self) -> Tensor | None:
        """``(columns, columns)``, the sum of ``(x - mean) (x - mean)^T``; None where there is no ``gram``."""
        if self.gram is None:
            return None
        return self.gram - torch.outer(self.total, self.total) / max(self.count, 1)

    @property
    def mean_square(self) -> Tensor:
        """``(columns,)``."""
        return (self.squares / max(self.count, 1)).float()


def observe_columns(
    model: nn.Module, batches: Iterable[Any], forward: Forward, progress: Progress
) -> dict[str, ColumnStatistics]:
    """Statistics of every Linear's quantized inputs over the calibration data, by the name of its weight view.

    Convolutions are left out: their unfolded columns are many, and their input has one scale.
    """
    views = [view for _, view in weight_views(model) if not isinstance(view.owner, nn.Conv2d)]
    samples = record_of(model).plan.recipe.calibration_samples
    with _watching(views) as statistics:
        with failing_together():
            for batch in progress(bounded(batches, samples), 'column statistics'):
                forward(model, batch)
        for found in statistics.values():
            found.pool()
    return {name: found for name, found in statistics.items() if found.count}


@contextmanager
def _watching(views: list[WeightView]) -> Iterator[dict[str, ColumnStatistics]]:
    statistics = {}
    for view in views:
        matrix = view.matrix()
        statistics[view.name] = view.map.watcher = ColumnStatistics(matrix.shape[1], matrix.device)
    try:
        yield statistics
    finally:
        for view in views:
            view.map.watcher = None
