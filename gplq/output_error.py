"""How far a site's output is from what it was, for each scale that is being chosen: squared, weighted or by angle."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

__all__ = ['Metric', 'OutputError']

Metric = Literal['hessian', 'mse', 'cosine']


class OutputError:
    """Adds up the error of candidates over several outputs.

    Args:
        metric: ``'mse'``; ``'hessian'``, squared errors weighted by squared gradients (PTQ4ViT eq. 9); ``'cosine'``,
            one minus the cosine of the angle.
        shape: of the scale, aligned with the output's last axes: errors are summed over all axes of length 1.
    """

    def __init__(self, metric: Metric, shape: tuple[int, ...]) -> None:
        self.metric = metric
        self.shape = shape
        self._sums: list[Tensor] = []

    def add(self, found: Tensor, target: Tensor, weight: Tensor | None) -> None:
        """Take in candidates' outputs ``(candidates, *target.shape)``; ``weight`` has the target's shape."""
        if self.metric == 'cosine':
            terms = [found * target, found.square(), target.square().expand_as(found)]
        else:
            error = (found - target).square_()
            terms = [error if weight is None or self.metric == 'mse' else error.mul_(weight)]
        sums = [self._reduce(term) for term in terms]
        self._sums = sums if not self._sums else [a + b for a, b in zip(self._sums, sums, strict=True)]

    def total(self) -> Tensor:
        """``(candidates, *shape)``."""
        if self.metric != 'cosine':
            return self._sums[0]
        dot, found, target = self._sums
        return 1 - dot / (found * target).sqrt().clamp(min=torch.finfo(dot.dtype).tiny)

    def _reduce(self, term: Tensor) -> Tensor:
        count = term.shape[0]
        wide = (1,) * (term.dim() - 1 - len(self.shape)) + self.shape
        axes = [axis + 1 for axis, size in enumerate(wide) if size == 1]
        return (term.double().sum(dim=axes, keepdim=True) if axes else term.double()).reshape(count, *self.shape)
