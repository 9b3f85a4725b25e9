from __future__ import annotations

import pytest
import torch

from gplq.variation import Variation, variation


def test_by_hand() -> None:
    found = Variation()
    found.add(torch.tensor([[1.0, -2.0], [3.0, 0.0]]))
    found.add(torch.tensor([[-1.0, 1.0]]))
    d = found.distribution()
    assert d is not None
    assert d.mean_size == pytest.approx(8 / 6)
    assert d.deviation == pytest.approx((16 / 6) ** 0.5)
    assert d.largest == 3
    assert d.kurtosis == pytest.approx(((1 + 16 + 81 + 1 + 1) / 6) / (16 / 6) ** 2)
    assert d.outliers == pytest.approx(3 / (8 / 6))
    # Channels reach 3 and 2; torch's median of two is the lower one.
    assert d.channel_ratio == pytest.approx(1.5)


def test_a_normal_distribution_has_a_kurtosis_of_three_and_an_outlier_channel_is_found() -> None:
    x = torch.randn(20_000, 8, generator=torch.Generator().manual_seed(0))
    found = Variation()
    found.add(x)
    d = found.distribution()
    assert d is not None and d.kurtosis == pytest.approx(3, abs=0.1) and d.channel_ratio < 1.5
    x[:, 2] *= 40
    found = Variation()
    found.add(x)
    d = found.distribution()
    assert d is not None and d.kurtosis > 10 and d.channel_ratio > 30


def test_zeros_and_nothing() -> None:
    assert Variation().distribution() is None
    found = Variation()
    found.add(torch.zeros(4, 3))
    d = found.distribution()
    assert d is not None
    assert (d.kurtosis, d.outliers, d.channel_ratio) == (0.0, 0.0, 1.0)
    assert variation([]) == variation([d]) == 0.0


def test_variation_is_the_spread_of_mean_sizes_whatever_the_unit() -> None:
    distributions = []
    for factor in (1.0, 3.0):
        found = Variation()
        found.add(torch.full((2, 2), factor))
        distributions.append(found.distribution())
    assert variation(distributions) == pytest.approx(1 / 2)
