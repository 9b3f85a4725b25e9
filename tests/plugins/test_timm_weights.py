"""Weights in a file give the model that timm makes of the same weights."""

from __future__ import annotations

import math
from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import checkpoint_filter_fn

from gplq.errors import CheckpointError
from gplq.plugins.timm_weights import fit_timm_state

SMALL = dict(depth=1, embed_dim=12, num_heads=3)


def waves(side: int, channels: int) -> torch.Tensor:
    """Positions as smooth as those that are learned, of which every other way of resizing makes something else."""
    row, column = torch.meshgrid(torch.arange(side) / side, torch.arange(side) / side, indexing='ij')
    parts = [torch.sin(2 * math.pi * ((c % 4 + 1) * column + (c // 4) * row) + c) for c in range(channels)]
    return torch.stack(parts, -1).reshape(1, side * side, channels)


@pytest.mark.parametrize('size', [64, 256, (64, 160)])
@pytest.mark.parametrize('features', [False, True])
@pytest.mark.parametrize(
    ('name', 'prefix'),
    [
        ('vit_tiny_patch16_224', 1),
        ('deit_tiny_distilled_patch16_224', 2),
        # Registers without a position, and a class token without one.
        ('vit_small_patch14_reg4_dinov2', 0),
    ],
)
def test_positions_are_resized_as_timm_does(name: str, prefix: int, features: bool, size: Any) -> None:
    patch = dict(patch_size=16)
    source = timm.create_model(name, img_size=128, **SMALL, **patch)
    with torch.no_grad():
        source.pos_embed[:, prefix:] = waves(8, 12)
    whole: Any = timm.create_model(name, img_size=size, **SMALL, **patch)
    expected = checkpoint_filter_fn(dict(source.state_dict()), whole)
    chosen = dict(features_only=True, out_indices=(0,)) if features else {}
    model: Any = timm.create_model(name, img_size=size, **SMALL, **patch, **chosen)
    found = fit_timm_state(model, source.state_dict(), 'file')
    assert set(found) == set(model.state_dict())
    for key, value in found.items():
        assert torch.equal(value, expected[key.removeprefix('model.')]), key


def test_positions_that_lie_in_no_square_are_refused() -> None:
    source = timm.create_model('vit_tiny_patch16_224', img_size=(32, 48), **SMALL)
    model = timm.create_model('vit_tiny_patch16_224', img_size=64, **SMALL)
    with pytest.raises(CheckpointError, match=r'pos_embed has shape \(1, 7, 12\) .*such positions cannot be resized'):
        fit_timm_state(model, source.state_dict(), 'file')
