from __future__ import annotations

import pytest
import torch

from gplq.plugins.positions import (
    absolute_positions,
    relative_bias,
    relative_positions,
    resize_grid,
    resize_table,
)


def test_relative_positions_are_rows_of_the_table() -> None:
    table = torch.arange(5.0)[:, None]  # distances -2, -1, 0, 1, 2
    assert relative_positions(table, 3)[..., 0].tolist() == [[2, 1, 0], [3, 2, 1], [4, 3, 2]]


def test_relative_bias_is_a_sum_over_rows_and_columns() -> None:
    height, width, dim = 2, 3, 4
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 3, height * width, dim, generator=generator)
    table_h = torch.randn(2 * height - 1, dim, generator=generator)
    table_w = torch.randn(2 * width - 1, dim, generator=generator)
    bias = relative_bias(query, table_h, table_w, height, width)
    for n in range(2):
        for head in range(3):
            for i in range(height * width):
                for j in range(height * width):
                    down = i // width - j // width + height - 1
                    right = i % width - j % width + width - 1
                    expected = query[n, head, i] @ (table_h[down] + table_w[right])
                    assert bias[n, head, i, j].item() == pytest.approx(expected.item(), abs=1e-5)


def test_tables_are_resized_linearly() -> None:
    # Three entries on five places: linear between centers, constant outside them.
    resized = resize_table(torch.tensor([[0.0], [1.0], [2.0]]), 5)
    assert resized[:, 0].tolist() == pytest.approx([0, 0.4, 1, 1.6, 2])


def test_grid_of_the_same_size_is_returned_unchanged() -> None:
    grid = torch.rand(1, 3, 3, 2)
    assert resize_grid(grid, 3, 3) is grid


def test_absolute_positions_drop_the_class_token_and_keep_a_constant() -> None:
    pos_embed = torch.full((1, 1 + 4, 3), 7.0)
    pos_embed[:, 0] = -1.0
    resized = absolute_positions(pos_embed, 5, 4)
    assert resized.shape == (1, 5, 4, 3)
    assert torch.allclose(resized, torch.full_like(resized, 7.0))


def test_absolute_positions_keep_rows_and_columns_apart() -> None:
    grid = torch.zeros(1, 1 + 4, 1)
    grid[0, 1:, 0] = torch.tensor([0.0, 1.0, 0.0, 1.0])  # grows to the right
    resized = absolute_positions(grid, 4, 6)[0, ..., 0]
    assert torch.allclose(resized, resized[:1].expand(4, 6))
    assert (resized[0].diff()[1:-1] > 0).all()
