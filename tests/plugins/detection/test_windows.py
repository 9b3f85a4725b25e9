from __future__ import annotations

import pytest
import torch

from gplq.plugins.detection.windows import join_windows, split_windows


def test_windows_of_a_padded_map() -> None:
    # 2 x 3 in windows of two: the second window holds the last column and zeros.
    x = torch.tensor([[1.0, 2, 3], [4, 5, 6]]).reshape(1, 2, 3, 1)
    windows = split_windows(x, 2)
    assert windows[..., 0].tolist() == [[[1, 2], [4, 5]], [[3, 0], [6, 0]]]


@pytest.mark.parametrize(('height', 'width'), [(4, 6), (5, 7), (1, 3), (2, 2)])
def test_join_undoes_split(height: int, width: int) -> None:
    x = torch.rand(2, height, width, 3)
    windows = split_windows(x, 2)
    assert windows.shape[0] == 2 * -(-height // 2) * -(-width // 2)
    assert torch.equal(join_windows(windows, 2, height, width), x)
