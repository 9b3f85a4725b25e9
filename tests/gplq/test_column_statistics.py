"""Statistics of what a weight multiplies."""

import torch

from gplq import column_statistics
from gplq.column_statistics import ColumnStatistics


def test_sums_over_all_vectors_of_all_batches():
    statistics = ColumnStatistics(2, torch.device('cpu'))
    statistics.add(torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]]))
    statistics.add(torch.tensor([[5.0, 6.0]]))
    assert statistics.count == 3
    assert statistics.mean.tolist() == [3.0, 4.0]
    assert torch.allclose(statistics.mean_square, torch.tensor([35.0, 56.0]) / 3)
    assert statistics.gram.tolist() == [[35.0, 44.0], [44.0, 56.0]]
    # 1, 3, 5 and 2, 4, 6 are two below, at and two above their means.
    assert statistics.covariance.tolist() == [[8.0, 8.0], [8.0, 8.0]]


def test_wide_layers_keep_no_gram_matrix(monkeypatch):
    monkeypatch.setattr(column_statistics, 'GRAM_COLUMNS', 3)
    statistics = ColumnStatistics(4, torch.device('cpu'))
    statistics.add(torch.ones(2, 4))
    assert statistics.gram is None and statistics.covariance is None
    assert statistics.mean_square.tolist() == [1.0] * 4
