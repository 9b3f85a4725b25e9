"""Outlier channels, as public DeiT and Swin have them, cost little: scales are searched with both sides in view."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import gplq
from gplq.errors import RecipeError, TargetError
from gplq.outliers import inject_outliers
from gplq.record import record_of

READERS = [
    ('blocks.0.norm1', 'blocks.0.attn.qkv'),
    ('blocks.0.norm2', 'blocks.0.fc1'),
    ('blocks.1.norm1', 'blocks.1.attn.qkv'),
    ('blocks.1.norm2', 'blocks.1.fc1'),
]


def twin_of(model: nn.Module) -> nn.Module:
    twin = copy.deepcopy(model)
    inject_outliers(twin, READERS)
    return twin


def test_the_function_stays_and_channels_stand_out(toy_vit: Callable[..., nn.Module], images: Tensor) -> None:
    model = toy_vit(width=32)
    twin = twin_of(model)
    with torch.no_grad():
        patches = [m.patch_embed(images).flatten(2).transpose(1, 2) for m in (model, twin)]  # type: ignore[operator]
        plain, marked = (
            m.get_submodule('blocks.0.norm1')(x).abs().amax((0, 1)) for m, x in zip((model, twin), patches, strict=True)
        )
    assert float(plain.max() / plain.median()) < 5
    assert float(marked.max() / marked.median()) > 20
    with torch.no_grad():
        assert torch.allclose(twin(images), model(images), atol=1e-5)


def w4a4_error(
    model: nn.Module, images: Tensor, recipe: gplq.Recipe, relative_error: Callable[[Tensor, Tensor], float]
) -> float:
    quantized = copy.deepcopy(model)
    gplq.prepare(quantized, recipe, images[:2])
    gplq.calibrate(quantized, [images])
    gplq.quantize_weights(quantized, [images])
    with torch.no_grad():
        return relative_error(quantized(images), model(images))


@pytest.mark.parametrize('compensation', ['none', 'ridge'])
def test_outliers_cost_little(
    toy_vit: Callable[..., nn.Module],
    images: Tensor,
    relative_error: Callable[[Tensor, Tensor], float],
    compensation: str,
) -> None:
    model = toy_vit(width=32)
    twin = twin_of(model)
    recipe = gplq.Recipe.gplq(4, 4, clips=(1.0, 0.8), compensation=compensation)
    plain = w4a4_error(model, images, recipe, relative_error)
    marked = w4a4_error(twin, images, recipe, relative_error)
    # Not equal: the plain twin may also choose scales that do not follow a channel from norm to weights.
    assert marked < 1.3 * plain
    nearest = gplq.Recipe.rtn(4, 4)
    assert w4a4_error(twin, images, nearest, relative_error) > 1.5 * marked


def test_the_readers_are_those_that_prepare_finds(toy_vit: Callable[..., nn.Module], images: Tensor) -> None:
    model = toy_vit(width=32)
    gplq.prepare(model, 'w4a4', images[:2])
    assert sorted(pair for pair in record_of(model).plan.norms if 'blocks' in pair[0]) == sorted(READERS)


@pytest.mark.parametrize(
    'pair, message',
    [
        (('blocks.0', 'blocks.0.fc1'), 'blocks.0 is no LayerNorm'),
        (('blocks.0.norm1', 'blocks.0.fc2'), 'blocks.0.fc2 is no Linear of the 32 channels'),
    ],
)
def test_a_pair_that_does_not_fit_is_named(
    toy_vit: Callable[..., nn.Module], pair: tuple[str, str], message: str
) -> None:
    with pytest.raises(TargetError, match=message):
        inject_outliers(toy_vit(width=32), [pair])


def test_narrow_norms_are_counted_by_what_they_have() -> None:
    model = nn.Sequential(nn.LayerNorm(2), nn.Linear(2, 2))
    assert inject_outliers(model, [('0', '1')], factors=(2.0, 4.0, 8.0)) == (1, 2)


@pytest.mark.parametrize('factor', [0.0, -2.0, float('inf'), float('nan')])
def test_factors_that_ruin_a_model_are_refused(factor: float) -> None:
    model = nn.Sequential(nn.LayerNorm(2), nn.Linear(2, 2))
    with pytest.raises(RecipeError, match='positive'):
        inject_outliers(model, [('0', '1')], factors=(2.0, factor))
