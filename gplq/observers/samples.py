"""A bounded random sample of what a site carries, for observers that need the distribution."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ['ColumnSample']


class ColumnSample:
    """Keeps at most ``limit`` random columns of the matrices it is shown, an equal share of each.

    It draws from a generator of its own: calibration must not move the training's random state.
    """

    def __init__(self, limit: int, per_tensor: int, seed: int = 0) -> None:
        self.limit = limit
        self.per_tensor = per_tensor
        self._generator = torch.Generator().manual_seed(seed)
        self._parts: list[Tensor] = []

    def add(self, matrix: Tensor) -> None:
        """Show a matrix ``(rows, columns)``; a random choice of its columns is copied."""
        columns = matrix.shape[1]
        if columns > self.per_tensor:
            chosen = torch.randint(columns, (self.per_tensor,), generator=self._generator)
            matrix = matrix[:, chosen.to(matrix.device)]
        self._parts.append(matrix.detach().clone())

    def matrix(self) -> Tensor:
        """The sample ``(rows, up to limit)``."""
        matrix = torch.cat(self._parts, dim=1)
        if matrix.shape[1] > self.limit:
            chosen = torch.randperm(matrix.shape[1], generator=self._generator)[: self.limit]
            matrix = matrix[:, chosen.to(matrix.device)]
        return matrix
