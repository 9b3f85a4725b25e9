"""The regularizer on codes made by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gplq.bin_regularization import bin_regularization, regularization_weight
from gplq.errors import RecipeError


def test_by_hand() -> None:
    # Two bits, step 0.5: codes -2..1, bins at -1, -0.5, 0, 0.5. Clipping moves 0.9 to 0.5.
    weight = torch.tensor([[0.1, -0.1, 0.4, 0.9]], dtype=torch.float64)
    value = bin_regularization(weight, torch.tensor([0.5], dtype=torch.float64), -2, 1)
    nearest = (0.1**2 + 0.1**2 + 0.1**2 + 0) / 4
    # Bin 0 holds 0.1 and -0.1, bin 0.5 holds 0.4 and 0.5.
    variances = 0.02 + 0.005
    assert value.item() == pytest.approx(nearest + variances)


def test_weights_in_the_middle_of_their_bins_cost_nothing() -> None:
    scale = torch.tensor([0.5, 0.1])
    weight = torch.randint(-4, 4, (2, 50)) * scale[:, None]
    assert bin_regularization(weight, scale, -4, 3).item() == pytest.approx(0, abs=1e-12)


def test_a_bin_of_one_weight_has_no_variance() -> None:
    weight, scale = torch.tensor([[0.2, 1.1]]), torch.tensor([1.0])
    assert bin_regularization(weight, scale, -2, 1).item() == pytest.approx((0.2**2 + 0.0) / 2)


@given(st.integers(0, 2**31), st.sampled_from([2, 3, 4, 8]))
@settings(deadline=None, max_examples=60)
def test_agrees_with_a_loop_over_rows_and_bins(seed: int, bits: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, 40, generator=generator, dtype=torch.float64)
    scale = torch.rand(3, generator=generator, dtype=torch.float64) + 0.05
    qmin, qmax = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    clipped = torch.stack([row.clamp(qmin * s, qmax * s) for row, s in zip(weight, scale, strict=True)])
    codes = (clipped / scale[:, None]).round()
    expected = (clipped - codes * scale[:, None]).square().mean()
    for row in range(3):
        for code in range(qmin, qmax + 1):
            members = clipped[row][codes[row] == code]
            if len(members) > 1:
                expected = expected + members.var() / 3
    torch.testing.assert_close(bin_regularization(weight, scale, qmin, qmax), expected)


def test_gradient_is_that_of_the_formula_and_draws_a_lone_weight_to_its_bin() -> None:
    weight = torch.randn(2, 12, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor([0.4, 0.7], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda w: bin_regularization(w, scale, -4, 3), weight)
    lone = torch.tensor([[0.3]], requires_grad=True)
    bin_regularization(lone, torch.tensor([1.0]), -2, 1).backward()
    assert lone.grad is not None and lone.grad.item() == pytest.approx(0.6)


def test_schedule_is_zero_for_a_quarter_and_then_half_a_cosine() -> None:
    assert [regularization_weight(share) for share in (0.0, 0.1, 0.25)] == [0.0, 0.0, 0.0]
    assert regularization_weight(0.625) == pytest.approx(0.005)
    assert regularization_weight(1.0) == pytest.approx(0.01)
    assert regularization_weight(1.0, start=1.0) == 0.0
    with pytest.raises(RecipeError, match='progress=1.5 must be between 0 and 1'):
        regularization_weight(1.5)
