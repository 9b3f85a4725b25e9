"""Distance between the feature maps of two models, without a unit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gplq.errors import TargetError

__all__ = ['feature_distance']


def feature_distance(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Mean over maps of ``||f_s - f_t||^2 / ||f_t||^2``, so that no map counts more than another for its size.

    Args:
        student: maps of any shape.
        teacher: as many, of the same shapes; no gradient flows into them.

    Returns:
        A number: 0 where the maps are equal, 1 for a student that gives zeros.

    Raises:
        TargetError: if the maps differ in number or shape.
    """
    shapes = [[tuple(features.shape) for features in maps] for maps in (student, teacher)]
    if shapes[0] != shapes[1] or not shapes[0]:
        raise TargetError(f'the student gives maps of {shapes[0]}, the teacher of {shapes[1]}: make them alike')
    distances = []
    for ours, theirs in zip(student, teacher, strict=True):
        target = theirs.detach().float()
        size = target.square().mean().clamp(min=torch.finfo(torch.float32).tiny)
        distances.append((ours.float() - target).square().mean() / size)
    return torch.stack(distances).mean()
