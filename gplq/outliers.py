"""Give a transformer the outlier channels that small models lack, without changing what it computes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import nn

from gplq.errors import RecipeError, TargetError

__all__ = ['OutlierCount', 'inject_outliers']


class OutlierCount(NamedTuple):
    """What was changed."""

    norms: int
    channels: int


@torch.no_grad()
def inject_outliers(
    model: nn.Module,
    readers: Iterable[tuple[str, str]],
    factors: Sequence[float] = (16.0, 64.0, 32.0),
    seed: int = 0,
) -> OutlierCount:
    """Multiply random channels of LayerNorms and divide the columns of the layers that read them.

    What LayerNorm hands on in public DeiT and Swin has a few channels ten to a hundred times larger than the rest
    (RepQ-ViT); quantizers of one scale a tensor break on them. Powers of two leave the output the same to
    the last bit.

    Args:
        model: changed in place.
        readers: LayerNorm and Linear, by name; the Linear must be the norm's only reader.
        factors: one for each channel that is picked in a LayerNorm.
        seed: picks the channels.

    Raises:
        RecipeError: if a factor is not a positive number.
        TargetError: if a pair is no LayerNorm with an affine and a Linear of as many inputs.
    """
    for value in factors:
        if not (math.isfinite(value) and value > 0):
            raise RecipeError(f'an outlier channel cannot be {value} times as large: give positive factors')
    generator = torch.Generator().manual_seed(seed)
    norms = changed = 0
    for norm_name, linear_name in readers:
        norm, linear = model.get_submodule(norm_name), model.get_submodule(linear_name)
        if not isinstance(norm, nn.LayerNorm) or norm.weight is None:
            raise TargetError(f'{norm_name} is no LayerNorm with a weight; outliers are put nowhere else')
        if not isinstance(linear, nn.Linear) or linear.in_features != norm.weight.numel():
            raise TargetError(f'{linear_name} is no Linear of the {norm.weight.numel()} channels of {norm_name}')
        channels = torch.randperm(norm.weight.numel(), generator=generator)[: len(factors)].to(norm.weight.device)
        factor = torch.tensor(factors[: len(channels)], device=norm.weight.device, dtype=norm.weight.dtype)
        norm.weight[channels] *= factor
        if norm.bias is not None:
            norm.bias[channels] *= factor
        linear.weight[:, channels] /= factor
        norms, changed = norms + 1, changed + len(channels)
    return OutlierCount(norms, changed)
