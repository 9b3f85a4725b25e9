"""How the values of a tensor are spread, in numbers that compare modules and models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ['Distribution', 'Variation', 'variation']


@dataclass(frozen=True)
class Distribution:
    """One tensor's values.

    Attributes:
        mean_size: mean of absolute values.
        deviation: root of the mean square.
        largest: largest absolute value.
        kurtosis: mean fourth power over the square of the mean square; 3 for a normal distribution around zero.
        outliers: ``largest / mean_size``.
        channel_ratio: the largest channel's largest value over the median channel's, 1 where no channel stands out.
    """

    mean_size: float
    deviation: float
    largest: float
    kurtosis: float
    outliers: float
    channel_ratio: float


class Variation:
    """Adds up what a distribution needs over batches; the last axis holds channels."""

    def __init__(self) -> None:
        self._count = 0
        self._sums = torch.zeros(3, dtype=torch.float64)
        self._largest: Tensor | None = None

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """Take in values ``(..., channels)``."""
        values = x.detach().double().cpu()
        squares = values.square()
        self._count += values.numel()
        self._sums += torch.stack([values.abs().sum(), squares.sum(), squares.square().sum()])
        largest = values.abs().reshape(-1, values.shape[-1]).amax(dim=0)
        self._largest = largest if self._largest is None else torch.maximum(self._largest, largest)

    def distribution(self) -> Distribution | None:
        """What was found; None where nothing was."""
        if self._largest is None or self._count == 0:
            return None
        mean, square, fourth = (self._sums / self._count).tolist()
        largest, median = float(self._largest.max()), float(self._largest.median())
        return Distribution(
            mean_size=mean,
            deviation=square**0.5,
            largest=largest,
            kurtosis=fourth / square**2 if square > 0 else 0.0,
            outliers=largest / mean if mean > 0 else 0.0,
            channel_ratio=largest / median if median > 0 else float('inf') if largest > 0 else 1.0,
        )


def variation(distributions: Sequence[Distribution]) -> float:
    """Standard deviation over modules of the mean absolute value (SDAM), over its mean so that it has no unit.

    Variation-aware quantization compares a transformer's modules with a convolutional network's by it (Huang et al.
    2023, sec. 3); the paper gives it in the values' own unit.
    """
    if not distributions:
        return 0.0
    sizes = torch.tensor([d.mean_size for d in distributions], dtype=torch.float64)
    mean = float(sizes.mean())
    return float(sizes.std(correction=0)) / mean if mean > 0 else 0.0
