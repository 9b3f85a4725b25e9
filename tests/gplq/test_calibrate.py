"""Calibration: signs, LSQ's element counts, and what a second calibration may not inherit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import gplq
from gplq.errors import CheckpointError
from gplq.observers import MSEObserver
from gplq.record import Stage, named_quantizers, record_of
from gplq.serialization import adopt, describe

Make = Callable[..., nn.Module]


def prepared(make: Make, images: Tensor, recipe: gplq.Recipe | str = 'w4a4') -> nn.Module:
    model = make(depth=1)
    gplq.prepare(model, recipe, images[:2])
    return model


def test_calibrating_again_forgets_the_first_sign(toy_vit: Make, images: Tensor) -> None:
    model, expected = prepared(toy_vit, images), prepared(toy_vit, images)
    gplq.calibrate(model, [images.abs()])
    pixels = dict(named_quantizers(model))['patch_embed:conv2d']
    assert pixels.spec.signed is False
    gplq.calibrate(model, [images])
    gplq.calibrate(expected, [images])
    assert pixels.spec.signed is True
    assert describe(model) == describe(expected)


def test_a_checkpoint_brings_its_signs_and_calibrating_again_forgets_them(toy_vit: Make, images: Tensor) -> None:
    source, model = prepared(toy_vit, images), prepared(toy_vit, images)
    gplq.calibrate(source, [images.abs()])
    adopt(model, describe(source))
    pixels = dict(named_quantizers(model))['patch_embed:conv2d']
    assert pixels.spec.signed is False
    gplq.calibrate(model, [images])
    assert pixels.spec.signed is True


def test_a_calibrated_checkpoint_serves_any_weight_stage(toy_vit: Make, images: Tensor) -> None:
    source = prepared(toy_vit, images)
    gplq.calibrate(source, [images])
    others = dict(weight_bits=3, weight_scheme='percentile', rounding='nearest', compensation='ridge')
    for recipe in (gplq.Recipe.gplq(**others, calibration_samples=5, compensation_bits=4), gplq.Recipe.gplq(32)):
        model = prepared(toy_vit, images, recipe)
        adopt(model, describe(source))
        assert record_of(model).plan.recipe == recipe
        assert record_of(model).stage is Stage.CALIBRATED
    with pytest.raises(CheckpointError, match='another recipe .activation_bits: 4 there, 3 here.'):
        adopt(prepared(toy_vit, images, 'w4a3'), describe(source))
    # Once the weights are quantized nothing is open any more.
    gplq.quantize_weights(source, [images])
    with pytest.raises(CheckpointError, match='another recipe .weight_bits: 4 there, 3 here.'):
        adopt(prepared(toy_vit, images, 'w3a4'), describe(source))


@pytest.mark.parametrize('linear_input', ['channel', 'tensor'])
def test_elements_are_those_of_one_sample(toy_vit: Make, images: Tensor, linear_input: str) -> None:
    """LSQ's gradient would otherwise depend on how many images were calibrated on."""
    model = prepared(toy_vit, images, gplq.Recipe.gplq(linear_input=linear_input))
    gplq.calibrate(model, [images[:5], images[5:]])
    found = {name: float(q.elements_per_scale) for name, q in named_quantizers(model)}
    # 16 tokens of 16 channels (32 after fc1), two heads of 8 channels each.
    share = 16 if linear_input == 'tensor' else 1
    assert found['patch_embed:conv2d'] == 3 * 16 * 16
    assert found['blocks.0.fc1:linear'] == 16 * share
    assert found['blocks.0.fc2:linear'] == 16 * (32 if linear_input == 'tensor' else 1)
    assert found['head:linear'] == share
    assert found['blocks.0.attn:0:query'] == 16 * 8
    assert found['blocks.0.attn:1:attention_map'] == 16 * 16
    assert found['blocks.0.attn:1:value'] == 16


def test_a_site_never_reached_leaves_the_quantizers_alone(toy_vit: Make, images: Tensor) -> None:
    model = prepared(toy_vit, images)
    with pytest.raises(gplq.GPLQError, match='never reached'):
        gplq.calibrate(model, [images], forward=lambda m, batch: m.patch_embed(batch))
    assert not any(q.enabled for _, q in named_quantizers(model))
    assert torch.equal(model(images), toy_vit(depth=1)(images))


class _Largest(TorchDispatchMode):
    """Elements of the largest tensor that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.elements = max(self.elements, result.numel())
        return result


def test_no_attention_map_is_written_out_whole(toy_vit: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be larger than all that training keeps, where fused attention never holds it."""
    monkeypatch.setattr('gplq.products._OBSERVED', 1 << 14)
    monkeypatch.setattr('gplq.fused_attention._CHUNK', {'cpu': 1 << 14})
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    model = toy_vit(fused=True)
    with torch.no_grad():
        # Queries that it pays to even out with their keys.
        model.blocks[0].attn.qkv.weight[1] *= 32  # type: ignore[index, union-attr]
    gplq.prepare(model, gplq.Recipe.gplq(calibration_samples=2), images)
    with _Largest() as largest:
        gplq.calibrate(model, [images])
    # 256 tokens: the map of one head is the least that is evened out at once.
    assert largest.elements <= 256 * 256


class Masked(nn.Module):
    """Self-attention of two heads with an additive mask."""

    def __init__(self, mask: Tensor | None) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, scale=0.7)
        return y.transpose(1, 2).flatten(2)


@pytest.mark.parametrize('shape', [None, (7, 7), (3, 1, 7, 7), (1, 7)], ids=str)
def test_a_map_in_parts_calibrates_as_the_whole(shape: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 7, 8)
    mask = None if shape is None else torch.randn(shape)
    reference = nn.Sequential(Masked(mask), nn.Linear(8, 8)).eval()
    recipe = gplq.Recipe.gplq(product_observer='min_max', equalize=False)
    found = []
    for together in (1 << 22, 100):
        monkeypatch.setattr('gplq.products._OBSERVED', together)
        model = nn.Sequential(Masked(mask), nn.Linear(8, 8)).eval()
        model.load_state_dict(reference.state_dict())
        gplq.prepare(model, recipe, x)
        outputs: list[Tensor] = []
        gplq.calibrate(model, [x], forward=lambda m, batch, kept=outputs: kept.append(m(batch)))  # type: ignore[misc]
        found.append((outputs[-1], model.state_dict()))
    (whole, expected), (parts, state) = found
    assert torch.allclose(whole, reference(x), atol=1e-5)
    assert torch.allclose(parts, whole, atol=1e-6)
    assert expected.keys() == state.keys()
    assert all(torch.allclose(state[name], value, atol=1e-6) for name, value in expected.items())


def test_parts_of_a_map_are_even(monkeypatch: pytest.MonkeyPatch) -> None:
    """An observer samples as much of each: a short remainder would count for far more than its values."""
    torch.manual_seed(0)
    x = torch.randn(1, 65, 8)
    shown: list[int] = []
    collect = MSEObserver._collect
    monkeypatch.setattr(
        MSEObserver, '_collect', lambda self, groups: (shown.append(groups.shape[1]), collect(self, groups))
    )
    model = nn.Sequential(Masked(None), nn.Linear(8, 8)).eval()
    gplq.prepare(model, gplq.Recipe.gplq(equalize=False, attention_map='uniform'), x)
    # Room for 64 of the 65 rows of both heads.
    monkeypatch.setattr('gplq.products._OBSERVED', 2 * 64 * 65)
    gplq.calibrate(model, [x])
    assert {2 * 33 * 65, 2 * 32 * 65} <= set(shown)
