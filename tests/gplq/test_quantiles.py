"""Quantiles of rows, by NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gplq import quantiles
from gplq.quantiles import row_quantiles


def test_row_quantiles(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = torch.randn(7, 50, dtype=torch.float64)
    # Two rows at a time, and one left over.
    monkeypatch.setattr(quantiles, '_VALUES', 100)
    found = row_quantiles(matrix, 0.001, 0.5, 0.9)
    assert np.allclose(torch.stack(found), np.quantile(matrix.numpy(), [0.001, 0.5, 0.9], axis=1))


def test_more_values_than_torch_takes_at_once() -> None:
    matrix = torch.arange(2.0**13).expand(2**12, -1)
    (middle,) = row_quantiles(matrix, 0.5)
    assert set(middle.tolist()) == {(2**13 - 1) / 2}
