"""Rounding with error feedback lies on the grid and beats rounding to nearest on its own quadratic."""

import torch

from gplq.error_feedback import damped, round_with_feedback
from gplq.weights import choose_weight_scales, restore_weight, round_weight


def problem(rows=8, columns=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator)
    inputs = torch.randn(400, columns, generator=generator) @ mixing
    return torch.randn(rows, columns, generator=generator), inputs


def test_two_columns_by_hand():
    # Grid of step 1. Both inputs are always equal, so only the sum of the weights counts: 0.4 + 0.4 is 0.8. To
    # nearest, both become 0; with feedback the second takes over 0.4 from the first and becomes 1.
    weight = torch.tensor([[0.4, 0.4]])
    scales = choose_weight_scales(torch.tensor([[7.0, 7.0]]), 4, 'min_max')
    gram = torch.ones(2, 2)
    rounded = round_with_feedback(weight, scales, 4, gram, damping=1e-6)
    assert sorted(rounded[0].tolist()) == [0.0, 1.0]


def test_the_column_of_most_energy_is_rounded_first():
    # Inputs are (2, 1) times the same number, weights 0.4 each: the output is 1.2. The first column is rounded to 0,
    # and the second makes up for it at half the price: 0.4 + 2 * 0.4 becomes 1. In the other order it would be 2.
    scales = choose_weight_scales(torch.tensor([[7.0, 7.0]]), 4, 'min_max')
    for columns in ([0, 1], [1, 0]):
        gram = torch.tensor([[4.0, 2.0], [2.0, 1.0]])[columns][:, columns]
        rounded = round_with_feedback(torch.tensor([[0.4, 0.4]]), scales, 4, gram, damping=1e-6)
        assert rounded[0, columns].tolist() == [0.0, 1.0]


def test_beats_rounding_to_nearest_on_its_own_quadratic():
    weight, inputs = problem()
    scales = choose_weight_scales(weight, 3, 'mse')
    nearest = restore_weight(round_weight(weight, scales, 3), scales)
    fed_back = round_with_feedback(weight, scales, 3, inputs.t() @ inputs)
    errors = [((w - weight) @ inputs.t()).square().sum() for w in (nearest, fed_back)]
    assert errors[1] < 0.7 * errors[0]
    assert torch.allclose(restore_weight(round_weight(fed_back, scales, 3), scales), fed_back)


def test_uncorrelated_inputs_leave_nothing_to_make_up_for():
    weight, _ = problem()
    scales = choose_weight_scales(weight, 3, 'mse')
    rounded = round_with_feedback(weight, scales, 3, torch.diag(torch.rand(40) + 0.1))
    assert torch.allclose(rounded, restore_weight(round_weight(weight, scales, 3), scales))


def test_the_block_size_changes_nothing_and_dead_columns_do_no_harm():
    weight, inputs = problem()
    inputs[:, 5] = 0
    scales = choose_weight_scales(weight, 4, 'mse')
    gram = inputs.t() @ inputs
    assert torch.allclose(
        round_with_feedback(weight, scales, 4, gram, block=7), round_with_feedback(weight, scales, 4, gram, block=64)
    )


def test_inputs_that_are_all_but_equal():
    """Around their mean nothing is left but rounding, whose second moments need not be positive definite."""
    torch.manual_seed(0)
    noise = torch.randn(32, 32) * 1e-9
    gram = (noise + noise.t()) / 2
    assert torch.linalg.eigvalsh(gram).min() < 0
    weight = torch.randn(4, 32)
    scales = choose_weight_scales(weight, 4, 'mse')
    rounded = round_with_feedback(weight, scales, 4, gram)
    assert torch.isfinite(rounded).all()
    assert (rounded - weight).abs().max() < 4 * float(scales.scale.max())
    # What is positive definite has the damping that was asked for.
    assert torch.equal(damped(torch.eye(3)), 1.01 * torch.eye(3, dtype=torch.float64))


def test_no_damping_where_some_is_needed():
    ones = torch.ones(3, 3, dtype=torch.float64)
    assert torch.equal(damped(ones + torch.eye(3), 0.0), ones + torch.eye(3))
    # Of rank one: the least share, or ten times as much, makes it positive definite.
    made = damped(ones, 0.0)
    assert not torch.linalg.cholesky_ex(made).info
    assert torch.allclose(made, ones, rtol=0, atol=1e-6)
