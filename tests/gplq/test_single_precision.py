"""Scales stay in FP32 whatever the model around them is cast to."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import gplq
from gplq.layers import LinearMap
from gplq.quantizer import Quantizer
from gplq.spec import QuantizerSpec
from gplq.weights import WeightQuantizer


def linear_map() -> LinearMap:
    quantizer = Quantizer(QuantizerSpec(8, signed=False, offset=True), (3,))
    # 70,000 elements are infinite in float16, and the scales no multiples of its steps.
    quantizer.initialize(torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.1, 0.2, 0.3]), signed=False, elements=70_000)
    return LinearMap(quantizer, WeightQuantizer(8, 4, asymmetric=True, folded=True), 4)


@pytest.mark.parametrize(
    'cast',
    [nn.Module.half, nn.Module.bfloat16, nn.Module.double, lambda m: m.to(torch.float16), lambda m: m.half().float()],
)
def test_a_cast_changes_nothing(cast: Callable[[nn.Module], nn.Module]) -> None:
    expected = linear_map().state_dict()
    model = nn.Sequential(linear_map(), nn.Linear(1, 1))
    cast(model)
    found = model[0].state_dict()
    assert all(tensor.dtype == torch.float32 for tensor in found.values())
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_the_rest_of_the_model_is_cast_and_all_of_it_moves() -> None:
    model = nn.Sequential(linear_map(), nn.Linear(1, 1)).to('meta', torch.float16)
    assert model[1].weight.dtype == torch.float16
    assert {tensor.device.type for tensor in model.state_dict().values()} == {'meta'}
    assert model[0].input.log_scale.dtype == torch.float32  # type: ignore[union-attr]


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_codes_of_a_cast_model_are_those_of_the_single_precision_one(dtype: torch.dtype) -> None:
    """At 8 bits a scale in bfloat16 would move the largest codes."""
    quantizer = linear_map().input
    assert quantizer is not None
    x = torch.linspace(0, 80, 300).reshape(100, 3).to(dtype)
    expected = quantizer.codes(x.float())
    nn.Sequential(quantizer).to(dtype)
    assert torch.equal(quantizer.codes(x), expected)
    assert torch.equal(quantizer(x), quantizer(x.float()).to(dtype))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_a_quantized_model_runs_after_a_cast(
    quantized: Callable[..., nn.Module], images: Tensor, relative_error: Callable[..., float], dtype: torch.dtype
) -> None:
    model = quantized(gplq.Recipe.paper(8, 8), fused=True)
    with torch.no_grad():
        expected = model(images)
        found = model.to(dtype)(images.to(dtype))
    assert found.dtype == dtype
    assert relative_error(found.float(), expected) < 0.03
