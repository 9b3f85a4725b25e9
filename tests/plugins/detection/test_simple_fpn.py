from __future__ import annotations

import pytest
import torch

from gplq.plugins.detection import LN2d, SimpleFPN


def test_levels_of_patch_16() -> None:
    neck = SimpleFPN(in_channels=16, out_channels=8)
    shapes = [tuple(m.shape) for m in neck((torch.rand(2, 16, 8, 12),))]
    assert shapes == [(2, 8, 32, 48), (2, 8, 16, 24), (2, 8, 8, 12), (2, 8, 4, 6), (2, 8, 2, 3)]


def test_levels_of_patch_8() -> None:
    neck = SimpleFPN(in_channels=16, out_channels=8, scales=(2.0, 1.0, 0.5, 0.25), num_outs=4)
    shapes = [tuple(m.shape[2:]) for m in neck((torch.rand(1, 16, 8, 12),))]
    assert shapes == [(16, 24), (8, 12), (4, 6), (2, 3)]


def test_extra_level_takes_every_other_position() -> None:
    neck = SimpleFPN(in_channels=4, out_channels=2, scales=(1.0,), num_outs=2)
    first, extra = neck((torch.rand(1, 4, 5, 5),))
    assert torch.equal(extra, first[..., ::2, ::2])


def test_errors_name_the_value() -> None:
    with pytest.raises(ValueError, match='scale 3.0'):
        SimpleFPN(in_channels=4, out_channels=2, scales=(3.0,), num_outs=1)
    with pytest.raises(ValueError, match='num_outs=1'):
        SimpleFPN(in_channels=4, out_channels=2, num_outs=1)
    with pytest.raises(ValueError, match='got 2 maps'):
        SimpleFPN(in_channels=4, out_channels=2)((torch.rand(1, 4, 4, 4), torch.rand(1, 4, 4, 4)))


def test_ln2d_normalizes_over_channels_with_the_biased_variance() -> None:
    norm = LN2d(2, eps=0.0)
    norm.weight.data = torch.tensor([2.0, 3.0])
    norm.bias.data = torch.tensor([0.5, 0.0])
    x = torch.tensor([1.0, 5.0]).reshape(1, 2, 1, 1)  # mean 3, deviation 2
    assert norm(x).flatten().tolist() == pytest.approx([-1.5, 3.0])


def test_ln2d_answers_in_float32_under_autocast() -> None:
    with torch.autocast('cpu', torch.bfloat16):
        assert LN2d(2)(torch.rand(1, 2, 3, 3, dtype=torch.bfloat16)).dtype == torch.float32
