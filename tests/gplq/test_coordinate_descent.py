"""Coordinate descent stays on the grid, never makes a rounded weight worse, and ends where no code is better."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from gplq.coordinate_descent import descend
from gplq.error_feedback import damped, round_with_feedback
from gplq.weights import WeightScales, choose_weight_scales, restore_weight, round_weight


def problem(rows: int = 8, columns: int = 40, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight and the second moments of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(400, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    return torch.randn(rows, columns, generator=generator), damped(inputs.t() @ inputs)


def errors(weight: Tensor, rounded: Tensor, gram: Tensor) -> Tensor:
    difference = (weight - rounded).double()
    return ((difference @ gram) * difference).sum(1)


def nearest(weight: Tensor, scales: WeightScales, bits: int) -> Tensor:
    return restore_weight(round_weight(weight, scales, bits), scales)


def test_two_columns_by_hand() -> None:
    # Grid of step 1, inputs (2, 1) times the same number, weights 0.3 each: the output is 0.9. To nearest both are 0.
    # The column of most energy would have to be 0.3 + 0.3 / 2 = 0.45 and stays; the other 0.3 + 2 * 0.3 = 0.9: 1.
    scales = choose_weight_scales(torch.tensor([[7.0, 7.0]]), 4, 'min_max')
    for columns in ([0, 1], [1, 0]):
        gram = torch.tensor([[4.0, 2.0], [2.0, 1.0]], dtype=torch.float64)[columns][:, columns]
        found = descend(torch.full((1, 2), 0.3), torch.zeros(1, 2), scales, 4, gram)
        assert found[0, columns].tolist() == [0.0, 1.0]


@pytest.mark.parametrize('scheme', ['mse', 'percentile_asymmetric'])
@pytest.mark.parametrize('bits', [2, 4])
def test_no_row_gets_worse_and_all_together_much_better(bits: int, scheme: str) -> None:
    weight, gram = problem()
    scales = choose_weight_scales(weight, bits, scheme)
    for start in (nearest(weight, scales, bits), round_with_feedback(weight, scales, bits, gram)):
        found = descend(weight, start, scales, bits, gram)
        before, after = errors(weight, start, gram), errors(weight, found, gram)
        assert bool((after <= before * (1 + 1e-9)).all())
        assert float(after.sum()) < 0.95 * float(before.sum())
        assert torch.allclose(nearest(found, scales, bits), found)


def test_in_the_end_no_other_code_of_any_one_column_is_better() -> None:
    weight, gram = problem(rows=3, columns=12)
    scales = choose_weight_scales(weight, 3, 'mse')
    found = descend(weight, nearest(weight, scales, 3), scales, 3, gram, sweeps=100)
    least = errors(weight, found, gram)
    for column, code in product(range(12), range(-4, 4)):
        other = found.clone()
        other[:, column] = code * scales.scale
        assert bool((errors(weight, other, gram) >= least * (1 - 1e-9)).all())
    # Sweeps that change nothing are the last.
    assert torch.equal(descend(weight, found, scales, 3, gram, sweeps=1), found)


def test_uncorrelated_inputs_leave_the_nearest_codes() -> None:
    weight, _ = problem()
    scales = choose_weight_scales(weight, 3, 'mse')
    gram = torch.diag(torch.rand(40, generator=torch.Generator().manual_seed(0)) + 0.1).double()
    found = descend(weight, torch.zeros_like(weight), scales, 3, gram)
    assert torch.allclose(found, nearest(weight, scales, 3))


def test_the_block_size_changes_nothing() -> None:
    weight, gram = problem()
    scales = choose_weight_scales(weight, 3, 'mse')
    start = nearest(weight, scales, 3)
    small, large = (descend(weight, start, scales, 3, gram, block=block) for block in (7, 64))
    assert torch.allclose(small, large)
