"""Fits from running sums against solvers that see all samples at once."""

from __future__ import annotations

import pytest
import torch

from gplq.least_squares import AffineFit, LinearFit, ridge_solve


def samples() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 6, generator=generator) * torch.tensor([1.0, 2, 3, 1, 1, 1]) + 3
    y = x @ torch.randn(6, 4, generator=generator) + torch.randn(300, 4, generator=generator)
    return x, y


def fitted(x: torch.Tensor, y: torch.Tensor) -> LinearFit:
    fit = LinearFit(6, 4)
    fit.add(x[:100], y[:100])
    fit.add(x[100:].reshape(2, 100, 6), y[100:].reshape(2, 100, 4))
    return fit


def test_without_damping_it_is_the_least_squares_optimum() -> None:
    x, y = samples()
    matrix, bias = fitted(x, y).solve(0.0)
    expected = torch.linalg.lstsq(torch.cat([x, torch.ones(300, 1)], dim=1).double(), y.double()).solution
    assert torch.allclose(matrix, expected[:-1], atol=1e-4)
    assert torch.allclose(bias, expected[-1], atol=1e-3)


def test_ridge_minimizes_its_own_objective_and_leaves_the_bias_alone() -> None:
    x, y = (t.double() for t in samples())
    strength = 0.1
    matrix, bias = fitted(x, y).solve(strength)
    centered = x - x.mean(dim=0)
    damping = strength * (centered.t() @ centered).diagonal().mean()

    def objective(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (x @ a + b - y).square().sum() + damping * a.square().sum()

    a, b = matrix.double().requires_grad_(), bias.double().requires_grad_()
    slopes = torch.autograd.grad(objective(a, b), (a, b))
    scale = torch.autograd.grad(objective(torch.zeros_like(a).requires_grad_(), b), b)[0].abs().max()
    # At the optimum the gradient is zero, which 0.999 of the solution has not.
    assert all(float(slope.abs().max()) < 1e-5 * float(scale) for slope in slopes)
    assert float(objective(a, b)) < float(objective(0.999 * a, b))


def test_a_singular_gram_is_solved_as_well() -> None:
    gram = torch.ones(2, 2, dtype=torch.float64)
    solution = ridge_solve(gram, torch.full((2, 1), 2.0, dtype=torch.float64), 0.0)
    assert torch.allclose(gram @ solution, torch.full((2, 1), 2.0, dtype=torch.float64), atol=1e-9)


def test_the_explained_share_is_that_of_the_residuals() -> None:
    x, y = samples()
    fit = fitted(x, y)
    matrix, bias = fit.solve(0.01)
    residual = (y - x @ matrix.float() - bias.float()).double().square().sum()
    total = (y - y.mean(dim=0)).double().square().sum()
    assert fit.r_squared(matrix, bias) == pytest.approx(float(1 - residual / total), abs=1e-5)


def test_gain_and_shift_of_a_channel_are_those_of_regression() -> None:
    x, y = samples()
    fit = AffineFit(4)
    fit.add(x[:120, :4], y[:120])
    fit.add(x[120:, :4], y[120:])
    gain, shift = fit.solve()
    for channel in range(4):
        design = torch.stack([x[:, channel], torch.ones(300)], dim=1).double()
        slope, offset = torch.linalg.lstsq(design, y[:, channel, None].double()).solution.flatten().tolist()
        if slope > 0:
            assert (float(gain[channel]), float(shift[channel])) == pytest.approx((slope, offset), rel=1e-6)
        else:
            assert float(gain[channel]) == 1
    error = (gain * x[:, :4] + shift - y).double().square().sum(dim=0)
    assert torch.allclose(fit.error(gain, shift), error, rtol=1e-6)
