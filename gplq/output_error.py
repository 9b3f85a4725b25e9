"""How far a site's output is from what it was, for each scale that is being chosen: squared, weighted or by angle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from gplq.distributed import total

__all__ = ['Metric', 'OutputError', 'least']

Metric = Literal['hessian', 'mse', 'cosine']


class OutputError:
    """Adds up the errors of candidates over several outputs.

    Args:
        metric: ``'mse'``; ``'hessian'``, squared errors weighted by squared gradients (PTQ4ViT eq. 9); ``'cosine'``,
            one minus the cosine of the angle.
        candidates: how many there are.
        shape: of the scale, aligned with the output's last axes: errors are summed over all axes of length 1.
        device: where the outputs are.
    """

    def __init__(
        self, metric: Metric, candidates: int, shape: tuple[int, ...], device: torch.device | None = None
    ) -> None:
        self.metric = metric
        self.shape = shape
        terms = 3 if metric == 'cosine' else 1
        self._sums = torch.zeros(terms, candidates, *shape, dtype=torch.float64, device=device)

    def add(self, found: Tensor, target: Tensor, weight: Tensor | None, first: int = 0) -> None:
        """Take in the outputs ``(some, *target.shape)`` of candidates from number ``first`` on.

        ``weight`` has the target's shape. What was found is overwritten.
        """
        some = slice(first, first + len(found))
        if self.metric == 'cosine':
            for index, term in enumerate((found * target, found.square_(), target.square()[None])):
                self._sums[index, some] += self._reduce(term)
            return
        error = found.sub_(target).square_()
        self._sums[0, some] += self._reduce(error if weight is None or self.metric == 'mse' else error.mul_(weight))

    def pool(self) -> None:
        """Take in what the other ranks have added."""
        total(self._sums)

    def total(self) -> Tensor:
        """``(candidates, *shape)``."""
        if self.metric != 'cosine':
            return self._sums[0]
        dot, found, target = self._sums
        error: Tensor = 1 - dot / (found * target).sqrt().clamp(min=torch.finfo(dot.dtype).tiny)
        return error

    def _reduce(self, term: Tensor) -> Tensor:
        wide = (1,) * (term.dim() - 1 - len(self.shape)) + self.shape
        axes = [axis + 1 for axis, size in enumerate(wide) if size == 1]
        return (term.sum(dim=axes) if axes else term).double().reshape(len(term), *self.shape)


def least(errors: Callable[[Metric], Tensor], metric: Metric, ratios: Sequence[float]) -> Tensor:
    """Number of the candidate of least error, ``(1, *shape)``.

    Where the metric finds none better than another, as behind units that no sample reaches, the squared error decides;
    where that does not either, the candidate that represents the largest value.

    Args:
        errors: of the candidates by a metric, ``(candidates, *shape)``, alike on all ranks.
        metric: that decides.
        ratios: each candidate's share of the scale that represents the largest value.
    """
    found = errors(metric)
    best = found.argmin(dim=0, keepdim=True)
    open_still = found.amax(dim=0, keepdim=True) == found.amin(dim=0, keepdim=True)
    if bool(open_still.any()):
        squared = errors('mse')
        nothing = squared.amax(dim=0, keepdim=True) == squared.amin(dim=0, keepdim=True)
        whole = min(range(len(ratios)), key=lambda number: abs(ratios[number] - 1))
        second = squared.argmin(dim=0, keepdim=True).masked_fill(nothing, whole)
        best = torch.where(open_still, second, best)
    return best
