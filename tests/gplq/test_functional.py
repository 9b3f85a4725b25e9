"""Fake quantization: values and gradients by hand, and properties that hold for all inputs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gplq.functional import dequantize, fake_quantize, quantize


def test_codes_of_a_signed_three_bit_quantizer() -> None:
    x = torch.tensor([-9.0, -2.0, -0.4, 0.0, 0.5, 1.4, 2.9, 100.0])
    # Steps of 0.5; halves go to even: 1.4 / 0.5 = 2.8 -> 3.
    assert quantize(x, torch.tensor(0.5), -4, 3).tolist() == [-4, -4, -1, 0, 1, 3, 3, 3]


def test_halves_go_to_even() -> None:
    assert quantize(torch.tensor([0.5, 1.5, 2.5, -0.5]), torch.tensor(1.0), -8, 7).tolist() == [0, 2, 2, 0]


def test_offset_is_in_steps() -> None:
    x = torch.tensor([1.0, 2.0, 5.0])
    codes = quantize(x, torch.tensor(0.5), 0, 3, torch.tensor(2.0))
    assert codes.tolist() == [0, 2, 3]
    assert dequantize(codes, torch.tensor(0.5), torch.tensor(2.0)).tolist() == [1.0, 2.0, 2.5]


def test_one_scale_a_channel() -> None:
    x = torch.tensor([[1.0, 10.0], [2.0, 20.0]])
    y = fake_quantize(x, torch.tensor([1.0, 10.0]), -8, 7)
    assert y.tolist() == x.tolist()


def test_arguments_are_left_alone() -> None:
    x, scale, offset = torch.tensor([0.3, 0.7]), torch.tensor(0.5), torch.tensor(0.25)
    kept = x.clone(), scale.clone(), offset.clone()
    fake_quantize(x, scale, 0, 3, offset)
    quantize(x, scale, 0, 3, offset)
    dequantize(x, scale, offset)
    assert all(torch.equal(a, b) for a, b in zip((x, scale, offset), kept, strict=True))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_single(dtype: torch.dtype) -> None:
    x = torch.linspace(-1, 1, 50).to(dtype)
    scale = torch.tensor(1 / 127)
    y = fake_quantize(x, scale, -128, 127)
    assert y.dtype == dtype
    assert torch.equal(y, fake_quantize(x.float(), scale, -128, 127).to(dtype))


def lsq_gradients(x: Tensor, scale: Tensor, qmin: int, qmax: int, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """LSQ (Esser et al. 2020, eqs. 3 and 5) element by element, without broadcasting."""
    to_x, to_scale = torch.zeros_like(x), torch.zeros(())
    for i, (value, g) in enumerate(zip(x.tolist(), upstream.tolist(), strict=True)):
        v = value / float(scale)
        if v <= qmin - 1e-9:
            slope = qmin
        elif v >= qmax + 1e-9:
            slope = qmax
        else:
            slope = round(v) - v
            to_x[i] = g
        to_scale += g * slope
    return to_x, to_scale


def test_gradients_are_lsq_s() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, generator=generator).mul_(2).requires_grad_()
    scale = torch.tensor(0.37, requires_grad=True)
    upstream = torch.randn(200, generator=generator)
    fake_quantize(x, scale, -4, 3, None, 0.25).backward(upstream)
    to_x, to_scale = lsq_gradients(x.detach(), scale.detach(), -4, 3, upstream)
    assert x.grad is not None and scale.grad is not None
    assert torch.allclose(x.grad, to_x)
    # Rounding errors are kept in steps of 1 / 254: each is off by at most half of one.
    assert abs(float(scale.grad - 0.25 * to_scale)) <= 0.25 * float(upstream.abs().sum()) / 508
    assert abs(float(scale.grad - 0.25 * to_scale)) <= 1e-2 * abs(float(scale.grad)), 'they cancel, by and large'


def test_scale_gradient_of_clipped_values_is_the_slope() -> None:
    """Where everything is clipped the quantizer is linear in its scale, so a difference quotient is exact."""
    x = torch.tensor([-50.0, 40.0, 60.0], dtype=torch.float64)
    weights = torch.tensor([1.0, 2.0, -0.5], dtype=torch.float64)
    scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    (fake_quantize(x, scale, -8, 7) * weights).sum().backward()
    step = 1e-3
    with torch.no_grad():
        high = (fake_quantize(x, scale + step, -8, 7) * weights).sum()
        low = (fake_quantize(x, scale - step, -8, 7) * weights).sum()
    assert scale.grad is not None
    assert float(scale.grad) == pytest.approx(float((high - low) / (2 * step)))


def test_offset_gradient() -> None:
    """Inside, the offset cancels; a clipped value is ``scale * (bound + offset)`` (LSQ+ eq. 5)."""
    x = torch.tensor([0.6, -7.0, 9.0])
    scale = torch.tensor(0.5, requires_grad=True)
    offset = torch.tensor(-1.0, requires_grad=True)
    y = fake_quantize(x, scale, 0, 3, offset)
    # Codes: 0.6 / 0.5 + 1 = 2.2 -> 2; clipped to 0; clipped to 3.
    assert y.tolist() == [0.5, -0.5, 1.0]
    y.backward(torch.tensor([1.0, 10.0, 100.0]))
    assert scale.grad is not None and offset.grad is not None
    assert float(offset.grad) == pytest.approx(110 * 0.5)
    # round(2.2) - 2.2 inside, then bound + offset.
    assert float(scale.grad) == pytest.approx(-0.2 + 10 * (0 - 1) + 100 * (3 - 1), rel=1e-5)


def test_gradients_have_the_shape_of_scale_and_offset() -> None:
    x = torch.randn(4, 3, 5, requires_grad=True)
    scale = torch.full((3, 1), 0.3, requires_grad=True)
    offset = torch.zeros(3, 1, requires_grad=True)
    fake_quantize(x, scale, 0, 15, offset).sum().backward()
    assert scale.grad is not None and offset.grad is not None and x.grad is not None
    assert scale.grad.shape == offset.grad.shape == (3, 1)
    assert x.grad.shape == x.shape


def test_frozen_scale_still_passes_gradients() -> None:
    x = torch.tensor([0.2, 99.0], requires_grad=True)
    fake_quantize(x, torch.tensor(0.5), -8, 7).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [1.0, 0.0]


finite = st.floats(-1e4, 1e4, allow_nan=False, width=32)
scales = st.floats(2**-10, 2**10, width=32)
bits = st.integers(2, 8)


@settings(deadline=None, max_examples=100)
@given(st.lists(finite, min_size=1, max_size=20), scales, bits, st.booleans())
def test_codes_are_integers_within_bounds(values: list[float], scale: float, width: int, signed: bool) -> None:
    qmin, qmax = (-(2 ** (width - 1)), 2 ** (width - 1) - 1) if signed else (0, 2**width - 1)
    codes = quantize(torch.tensor(values), torch.tensor(scale), qmin, qmax)
    assert torch.equal(codes, codes.round())
    assert float(codes.min()) >= qmin and float(codes.max()) <= qmax


@settings(deadline=None, max_examples=100)
@given(st.lists(finite, min_size=1, max_size=20), scales, bits)
def test_quantizing_twice_is_quantizing_once(values: list[float], scale: float, width: int) -> None:
    bounds = -(2 ** (width - 1)), 2 ** (width - 1) - 1
    step = torch.tensor(scale)
    once = fake_quantize(torch.tensor(values), step, *bounds)
    assert torch.equal(fake_quantize(once, step, *bounds), once)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=20), scales, bits)
def test_error_inside_is_at_most_half_a_step(values: list[float], scale: float, width: int) -> None:
    qmin, qmax = -(2 ** (width - 1)), 2 ** (width - 1) - 1
    step = torch.tensor(scale)
    x = torch.tensor(values) * step * qmax
    assert float((fake_quantize(x, step, qmin, qmax) - x).abs().max()) <= 0.5001 * scale


@settings(deadline=None, max_examples=50)
@given(st.lists(finite, min_size=2, max_size=20), scales, bits)
def test_order_is_kept(values: list[float], scale: float, width: int) -> None:
    x = torch.tensor(sorted(values))
    y = fake_quantize(x, torch.tensor(scale), -(2 ** (width - 1)), 2 ** (width - 1) - 1)
    assert bool((y.diff() >= 0).all())


def test_second_derivatives_are_refused() -> None:
    x = torch.randn(4, requires_grad=True)
    (gradient,) = torch.autograd.grad(fake_quantize(x, torch.tensor(0.5), -8, 7).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='once_differentiable'):
        gradient.sum().backward()


def test_compiles_once_for_all_sizes() -> None:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(lambda x, s: fake_quantize(x, s, -8, 7), backend='aot_eager')
    scale = torch.full((6,), 0.5, requires_grad=True)
    for rows in range(20, 32):
        x = torch.randn(rows, 6, requires_grad=True)
        y = compiled(x, scale)
        y.sum().backward()
        assert torch.equal(y, fake_quantize(x, scale, -8, 7))
    # One for the first size, one for any.
    assert counters['stats']['unique_graphs'] <= 2
