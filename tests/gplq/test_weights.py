"""Scales of weight rows, by hand."""

from __future__ import annotations

import pytest
import torch

from gplq.weights import WeightScales, choose_weight_scales, restore_weight, round_weight

# 0, 1, ..., 1000: the 0.999 quantile is 999.
LADDER = torch.arange(1001.0)[None]


def test_min_max() -> None:
    scales = choose_weight_scales(torch.tensor([[-14.0, 3.0], [0.0, 7.0]]), 4, 'min_max')
    assert scales.scale.tolist() == [2.0, 1.0] and scales.zero_point is None


def test_percentile_is_the_paper_s() -> None:
    scales = choose_weight_scales(LADDER, 4, 'percentile')
    assert scales.scale.tolist() == pytest.approx([999 / 7])
    assert choose_weight_scales(-LADDER, 4, 'percentile').scale.tolist() == pytest.approx([999 / 7])


def test_percentile_asymmetric_takes_the_best_of_three() -> None:
    """One value in 2,000 lies far out: at two bits it is better clipped, at eight it is kept."""
    row = torch.cat([torch.linspace(0, 3, 1999), torch.tensor([60.0])])[None]
    coarse, fine = (choose_weight_scales(row, bits, 'percentile_asymmetric') for bits in (2, 8))
    assert float(coarse.scale) == pytest.approx(1, abs=0.01)
    assert float(fine.scale) > 57 / 255
    assert coarse.zero_point is not None and coarse.zero_point.tolist() == [0.0]


def test_mse_clips_what_costs_less_than_it_saves() -> None:
    row = torch.cat([torch.full((100,), 0.5), torch.tensor([1.0])])[None]
    assert float(choose_weight_scales(row, 2, 'mse').scale) == pytest.approx(0.5, abs=0.01)
    # Where the single value counts as much as all others together, the scale moves towards it.
    importance = torch.cat([torch.ones(100), torch.tensor([100.0])])
    assert float(choose_weight_scales(row, 2, 'mse', importance).scale) == pytest.approx(0.75, abs=0.011)


def test_a_row_of_zeros() -> None:
    for scheme in ('min_max', 'percentile', 'percentile_asymmetric', 'mse'):
        scales = choose_weight_scales(torch.zeros(1, 4), 4, scheme)
        assert restore_weight(round_weight(torch.zeros(1, 4), scales, 4), scales).tolist() == [[0.0] * 4]


def test_rounding_with_a_zero_point() -> None:
    scales = WeightScales(torch.tensor([0.5]), torch.tensor([3.0]))
    codes = round_weight(torch.tensor([[-9.0, -1.5, 0.0, 0.6, 6.0, 9.0]]), scales, 4)
    assert codes.tolist() == [[0, 0, 3, 4, 15, 15]]
    assert restore_weight(codes, scales).tolist() == [[-1.5, -1.5, 0.0, 0.5, 6.0, 6.0]]
