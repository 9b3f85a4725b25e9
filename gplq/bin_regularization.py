"""Regularization that draws each weight to its bin's middle, so that it does not oscillate between two codes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gplq.errors import RecipeError

__all__ = ['bin_regularization', 'regularization_weight']


def bin_regularization(weight: Tensor, scale: Tensor, qmin: int, qmax: int) -> Tensor:
    """``mean((w - Q(w))^2) + sum over bins Var(w in bin)`` of clipped weights (VVTQ, "oscillation-aware bins").

    A bin holds the weights of one code. The codes are compared as whole numbers: equality of the rounded values, as the
    released code has it, fails where one value arises in two ways. Bins of a single weight have no variance.

    Rows have scales and bins of their own here; the sum over bins is a mean over rows, which for one row is the
    formula. Gradients reach the weights alone.

    Args:
        weight: ``(rows, columns)``.
        scale: step of each row, ``(rows,)``.
        qmin: smallest code.
        qmax: largest code.

    Returns:
        A number, in squared units of the weights.
    """
    steps = scale.detach()[:, None]
    clipped = weight.clamp(min=qmin * steps, max=qmax * steps)
    codes = (clipped.detach() / steps).round().clamp_(qmin, qmax)
    nearest = (clipped - codes * steps).square().mean()
    bins = (codes - qmin).long()
    shape = (len(weight), qmax - qmin + 1)
    count = torch.zeros(shape, dtype=clipped.dtype, device=clipped.device).scatter_add_(1, bins, torch.ones_like(codes))
    total = torch.zeros_like(count).scatter_add(1, bins, clipped)
    # Around each bin's own mean: a difference of squares would lose what is small beside the mean.
    deviation = clipped - (total / count.clamp(min=1)).gather(1, bins)
    squares = torch.zeros_like(count).scatter_add(1, bins, deviation.square())
    variance = squares / (count - 1).clamp(min=1)
    return nearest + variance.sum() / len(weight)


def regularization_weight(progress: float, largest: float = 0.01, start: float = 0.25) -> float:
    """Factor of the regularization: zero at first, then by half a cosine up to ``largest`` (VVTQ's released code).

    Args:
        progress: share of the training that is over, 0 to 1.
        largest: the factor at the end.
        start: share of the training before it begins.

    Raises:
        RecipeError: if a share is not between 0 and 1.
    """
    for name, value in (('progress', progress), ('start', start)):
        if not 0 <= value <= 1:
            raise RecipeError(f'{name}={value} must be between 0 and 1')
    if progress < start or start == 1:
        return 0.0
    return largest * (1 - math.cos(math.pi * (progress - start) / (1 - start))) / 2
