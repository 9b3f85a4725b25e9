"""Where a weight lies: reading and writing it reaches the parameter, whatever the order of its memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import gplq
from gplq import integer
from gplq.layers import LinearMap, WeightView
from gplq.record import weight_views


@pytest.mark.parametrize('memory', [torch.contiguous_format, torch.channels_last])
def test_written_values_reach_the_parameter(memory: torch.memory_format) -> None:
    layer = nn.Conv2d(3, 2, 4).to(memory_format=memory)
    kept = layer.weight
    view = WeightView('conv', layer, LinearMap(None, None, 2))
    values = torch.arange(96.0).reshape(2, 48)
    view.write(values)
    assert layer.weight is kept and layer.weight.is_contiguous(memory_format=memory)
    assert torch.equal(layer.weight, values.reshape(2, 3, 4, 4))
    assert torch.equal(view.matrix(), values)


def test_rows_of_a_shared_parameter() -> None:
    attention = nn.MultiheadAttention(4, 2)
    before = attention.in_proj_weight.detach().clone()
    view = WeightView('key', attention, LinearMap(None, None, 4), 'in_proj_weight', 'in_proj_bias', 4, 4)
    view.write(torch.ones(4, 4))
    assert torch.equal(attention.in_proj_weight[4:8], torch.ones(4, 4))
    assert torch.equal(attention.in_proj_weight[:4], before[:4])
    assert torch.equal(attention.in_proj_weight[8:], before[8:])


def test_a_model_in_channels_last_is_rounded_like_any_other(
    toy_vit: Callable[..., nn.Module], quantized: Callable[..., nn.Module], images: Tensor
) -> None:
    model = toy_vit(depth=1).to(memory_format=torch.channels_last)
    gplq.prepare(model, 'w4a4', images[:2])
    gplq.calibrate(model, [images])
    gplq.quantize_weights(model, [images])
    expected = quantized('w4a4', depth=1)
    assert torch.equal(model.patch_embed.weight, expected.patch_embed.weight)  # type: ignore[arg-type]
    view = next(view for _, view in weight_views(model) if view.name == 'patch_embed')
    assert integer.integer_linear(view).codes.shape == (16, 48)
