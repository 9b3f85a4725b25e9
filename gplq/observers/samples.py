"""A bounded random sample of what a site carries, for observers that need the distribution."""

from __future__ import annotations

import torch
from torch import Tensor

from gplq.distributed import gather_columns, world_size

__all__ = ['ColumnSample']


class ColumnSample:
    """Keeps at most ``limit`` random columns of the matrices it is shown, an equal share of each.

    It draws from a generator of its own: calibration must not move the training's random state.
    """

    def __init__(self, limit: int, seed: int = 0) -> None:
        self.limit = limit
        self._generator = torch.Generator().manual_seed(seed)
        self._kept: Tensor | None = None
        self._shown = 0

    def add(self, matrix: Tensor) -> None:
        """Show a matrix ``(rows, columns)``; a random choice of its columns is copied."""
        self._shown += 1
        matrix = matrix.detach()
        if self._kept is None:
            self._kept = self._choose(matrix, self.limit).clone()
        elif self._kept.shape[1] + matrix.shape[1] <= self.limit:
            self._kept = torch.cat([self._kept, matrix], dim=1)
        else:
            # Few matrices fill the sample as well as many: the newest gets its share, the others make room.
            fresh = self._choose(matrix, max(1, self.limit // self._shown, self.limit - self._kept.shape[1]))
            old = self._choose(self._kept, self.limit - fresh.shape[1])
            self._kept = torch.cat([old, fresh], dim=1)

    def pool(self, rows: int, device: torch.device) -> None:
        """Make room for the other ranks' samples and take them in; the same ones lie in the same order everywhere."""
        kept = torch.empty(rows, 0, device=device) if self._kept is None else self._kept
        pooled = gather_columns(self._choose(kept, self.limit // world_size()).contiguous())
        self._kept = pooled if pooled.numel() else None

    def _choose(self, matrix: Tensor, count: int) -> Tensor:
        columns = matrix.shape[1]
        if columns <= count:
            return matrix
        if columns > 16 * count:
            # Drawn with replacement: a permutation of millions costs more than a rare repetition.
            chosen = torch.randint(columns, (count,), generator=self._generator)
        else:
            chosen = torch.randperm(columns, generator=self._generator)[:count]
        return matrix[:, chosen.to(matrix.device)]

    def matrix(self) -> Tensor:
        """The sample ``(rows, up to limit)``."""
        assert self._kept is not None
        return self._kept
