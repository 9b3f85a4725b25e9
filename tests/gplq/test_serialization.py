"""Files say what the model is: after a cast, and not at all after a change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gplq
from gplq.errors import StageError
from gplq.layers import LinearCompensation

Make = Callable[..., nn.Module]

QUICK = gplq.Recipe.gplq(exponents=(0.5,), clips=(1.0,))
RECIPES = {
    'gplq': QUICK,
    'paper': gplq.Recipe.paper(),
    'ridge': QUICK.replace(compensation='ridge'),
    'affine': QUICK.replace(compensation='affine'),
    'asymmetric': QUICK.replace(
        weight_bits=8, weight_scheme='percentile_asymmetric', gelu_output='unsigned_offset', compensation='ridge'
    ),
}
DTYPES = [torch.float16, torch.bfloat16, torch.float64]


def outputs(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        y: Tensor = model(images)
    return y


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('recipe', RECIPES)
def test_a_cast_model_is_loaded_to_the_last_bit(
    toy_vit: Make, quantized: Make, images: Tensor, tmp_path: Path, recipe: str, dtype: torch.dtype
) -> None:
    model = quantized(RECIPES[recipe]).to(dtype)
    if recipe == 'paper':
        assert any(isinstance(module, LinearCompensation) for module in model.modules())
    gplq.save(model, tmp_path / 'model.safetensors')
    loaded = gplq.load(toy_vit().to(dtype), tmp_path / 'model.safetensors')
    assert torch.equal(outputs(loaded, images.to(dtype)), outputs(model, images.to(dtype)))


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('recipe', RECIPES)
def test_a_model_of_another_precision_goes_through_all_of_it(
    toy_vit: Make,
    quantized: Make,
    images: Tensor,
    tmp_path: Path,
    relative_error: Callable[..., float],
    recipe: str,
    dtype: torch.dtype,
) -> None:
    reference, settings = outputs(toy_vit(depth=1), images), RECIPES[recipe].replace(weight_bits=8, activation_bits=8)
    error = relative_error(outputs(quantized(settings, depth=1), images), reference)
    model, images = toy_vit(depth=1).to(dtype), images.to(dtype)
    gplq.prepare(model, settings, images[:2])
    gplq.calibrate(model, [images])
    gplq.quantize_weights(model, [images])
    # No worse than the same model in FP32, but for what bfloat16 itself costs.
    assert relative_error(outputs(model, images).float(), reference) < 1.2 * error + 0.02
    gplq.save(model, tmp_path / 'model.safetensors')
    loaded = gplq.load(toy_vit(depth=1).to(dtype), tmp_path / 'model.safetensors')
    assert torch.equal(outputs(loaded, images), outputs(model, images))


def _one_weight(weight: Tensor) -> None:
    weight.view(-1)[7] += 1e-3


def _all_weights(weight: Tensor) -> None:
    # What one step of AdamW at the stage's own rate does.
    weight -= 5e-6


@pytest.mark.parametrize('change', [_one_weight, _all_weights])
def test_a_weight_that_was_changed_is_not_saved(
    quantized: Make, tmp_path: Path, change: Callable[[Tensor], None]
) -> None:
    model = quantized(depth=1)
    path = tmp_path / 'model.safetensors'
    gplq.save(model, path)
    before = path.read_bytes()
    with torch.no_grad():
        change(model.blocks[0].fc1.weight)  # type: ignore[union-attr, index]
    with pytest.raises(StageError, match=r'blocks\.0\.fc1.*changed after quantize_weights'):
        gplq.save(model, path)
    assert path.read_bytes() == before


@pytest.mark.parametrize('loads', [False, True])
def test_training_on_leaves_rounded_weights_alone(
    toy_vit: Make, quantized: Make, images: Tensor, tmp_path: Path, loads: bool
) -> None:
    """Biases and norms may still be trained; the file has them as they are."""
    path = tmp_path / 'model.safetensors'
    model = quantized(depth=1)
    gplq.save(model, path)
    if loads:
        model = gplq.load(toy_vit(depth=1), path)
    assert not any(p.requires_grad for name, p in model.named_parameters() if p.dim() > 1 or 'scale' in name)
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    before = model.norm.bias.detach().clone()  # type: ignore[union-attr, operator]
    F.cross_entropy(model(images), torch.arange(16) % 5).backward()
    optimizer.step()
    assert not torch.equal(model.norm.bias, before)  # type: ignore[union-attr, arg-type]
    gplq.save(model, path)
    assert torch.equal(outputs(gplq.load(toy_vit(depth=1), path), images), outputs(model, images))
