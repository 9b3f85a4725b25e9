"""Input scales that suit both sides: the two ends of the family, and what the balanced family does not notice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import gplq
from gplq.exponent import InputScale, search_input_scale
from gplq.functional import dequantize, quantize
from gplq.observers import Range
from gplq.spec import QuantizerSpec

SPEC = QuantizerSpec(4)


def inputs() -> tuple[Tensor, Range]:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(256, 6, generator=generator) * torch.tensor([1.0, 1.0, 2.0, 0.5, 30.0, 1.0])
    return vectors, Range(vectors.amin(0), vectors.amax(0))


def weight() -> Tensor:
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(1))


def search(vectors: Tensor, seen: Range, matrix: Tensor, bits: int = 4, **settings: Any) -> InputScale:
    return search_input_scale(vectors, seen, matrix, SPEC, bits, gplq.Recipe(**settings))


def test_exponent_one_is_per_channel() -> None:
    vectors, seen = inputs()
    found = search(vectors, seen, weight(), exponents=(1.0,), clips=(1.0,), balance=False)
    assert torch.allclose(found.scale, torch.maximum(seen.low / -8, seen.high / 7))


def test_exponent_zero_is_per_tensor() -> None:
    vectors, seen = inputs()
    found = search(vectors, seen, weight(), exponents=(0.0,), clips=(1.0,), balance=False)
    widest = torch.maximum(seen.low / -8, seen.high / 7).max()
    assert torch.allclose(found.scale, widest.expand(6))


def test_the_widest_channel_fits_at_every_exponent() -> None:
    vectors, seen = inputs()
    for alpha in (0.0, 0.25, 0.5, 0.75, 1.0):
        for balance in (False, True):
            found = search(vectors, seen, weight(), exponents=(alpha,), clips=(1.0,), balance=balance)
            needed = torch.maximum(seen.low / -8, seen.high / 7)
            assert float((found.scale / needed).min()) == pytest.approx(1.0, rel=1e-5)


def test_more_candidates_are_never_worse() -> None:
    vectors, seen = inputs()
    target = vectors @ weight().t()

    def error(found: InputScale) -> float:
        from gplq.exponent import _rounded
        from gplq.functional import dequantize, quantize

        x = dequantize(quantize(vectors, found.scale, -8, 7), found.scale)
        matrix = _rounded(weight(), found.scale, 4, gplq.Recipe())
        return float((x @ matrix.t() - target).square().mean())

    every = error(search(vectors, seen, weight()))
    for alpha in (0.0, 0.5, 1.0):
        assert every <= error(search(vectors, seen, weight(), exponents=(alpha,), clips=(1.0,), balance=False)) * 1.0001


def test_balanced_scales_follow_a_channel_that_moves_from_norm_to_weights() -> None:
    """Inputs of a channel times k, its weight column divided by k: the same codes on both sides."""
    vectors, seen = inputs()
    factor = torch.tensor([1.0, 64.0, 1.0, 1.0, 0.125, 8.0])
    for alpha in (0.0, 0.25, 0.5):
        # With no plain candidate the search would be empty, so compare the balanced choice where it wins.
        settings: dict[str, Any] = {'exponents': (alpha,), 'clips': (1.0,), 'balance': True}
        plain = search(vectors, seen, weight(), **settings)
        moved = search(vectors * factor, Range(seen.low * factor, seen.high * factor), weight() / factor, **settings)
        assert moved.balanced
        if plain.balanced:
            assert torch.allclose(moved.scale, plain.scale * factor, rtol=1e-4)


def test_a_dead_channel_takes_no_part() -> None:
    vectors, seen = inputs()
    vectors[:, 2] = 0
    seen = Range(vectors.amin(0), vectors.amax(0))
    found = search(vectors, seen, weight())
    assert bool(found.scale.isfinite().all())
    alive = torch.tensor([0, 1, 3, 4, 5])
    assert float(found.scale[2]) <= float(found.scale[alive].max())


def test_a_dead_channel_takes_the_smallest_scale() -> None:
    """Of small inputs the step of 1 that a range of zero width gets would be the largest: 1,000 times too wide."""
    vectors, _ = inputs()
    vectors *= 1e-3
    vectors[:, 2] = 0
    seen = Range(vectors.amin(0), vectors.amax(0))
    found = search(vectors, seen, weight(), exponents=(1.0,), clips=(1.0,), balance=False)
    alive = torch.tensor([0, 1, 3, 4, 5])
    assert torch.allclose(found.scale[alive], torch.maximum(seen.low / -8, seen.high / 7)[alive])
    assert float(found.scale[2]) == pytest.approx(float(found.scale[alive].min()))


def test_inputs_that_are_all_zero() -> None:
    found = search(torch.zeros(4, 6), Range(torch.zeros(6), torch.zeros(6)), weight())
    assert bool((found.scale > 0).all() and found.scale.isfinite().all())


def test_offset_covers_one_sided_values() -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.rand(200, 6, generator=generator) * 4 - 0.2
    spec = QuantizerSpec(4, signed=False, granularity='channel', offset=True)
    seen = Range(vectors.amin(0), vectors.amax(0))
    recipe = gplq.Recipe(exponents=(1.0,), clips=(1.0,), balance=False)
    found = search_input_scale(vectors, seen, weight(), spec, 32, recipe)
    assert found.offset is not None
    assert torch.allclose(found.scale * (0 + found.offset), seen.low, atol=1e-5)
    assert torch.allclose(found.scale * (15 + found.offset), seen.high, atol=1e-5)


@pytest.mark.parametrize('value', [-30.0, 0.01, 10.0])
def test_a_constant_channel_has_a_scale_of_its_own(value: float) -> None:
    vectors, _ = inputs()
    vectors[:, 2] = value
    seen = Range(vectors.amin(0), vectors.amax(0))
    spec = QuantizerSpec(8, signed=False, offset=True)
    found = search_input_scale(
        vectors, seen, weight(), spec, 32, gplq.Recipe(exponents=(1.0,), clips=(1.0,), balance=False)
    )
    codes = quantize(vectors, found.scale, spec.qmin, spec.qmax, found.offset)
    assert torch.allclose(dequantize(codes, found.scale, found.offset)[:, 2], vectors[:, 2], rtol=1e-5)
