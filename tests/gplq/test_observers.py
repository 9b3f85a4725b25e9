"""Observers: ranges and scales by hand or by brute force."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gplq.errors import CalibrationError, RecipeError
from gplq.functional import dequantize, quantize
from gplq.observers import (
    OBSERVERS,
    MinMaxObserver,
    MSEObserver,
    PercentileObserver,
    Range,
    make_observer,
    scale_from_range,
)
from gplq.observers.least_error import least_error
from gplq.observers.samples import ColumnSample
from gplq.observers.vectors import VectorObserver
from gplq.spec import QuantizerSpec


@pytest.mark.parametrize(
    ('low', 'high', 'spec', 'scale'),
    [
        (-8.0, 7.0, QuantizerSpec(4), 1.0),
        (-16.0, 7.0, QuantizerSpec(4), 2.0),
        (-1.0, 14.0, QuantizerSpec(4), 2.0),
        (0.0, 15.0, QuantizerSpec(4, signed=False), 1.0),
        (2.0, 30.0, QuantizerSpec(4, signed=False), 2.0),
        (0.0, 0.0, QuantizerSpec(4), 1.0),
    ],
)
def test_scale_from_range(low: float, high: float, spec: QuantizerSpec, scale: float) -> None:
    found, offset = scale_from_range(torch.tensor([low]), torch.tensor([high]), spec)
    assert offset is None
    assert found.tolist() == [scale]


def test_scale_and_offset_span_the_range() -> None:
    spec = QuantizerSpec(4, signed=False, offset=True)
    scale, offset = scale_from_range(torch.tensor([-3.0]), torch.tensor([12.0]), spec)
    assert offset is not None
    assert scale.tolist() == [1.0]
    assert dequantize(torch.tensor([0.0, 15.0]), scale, offset).tolist() == [-3.0, 12.0]


def test_range_with_offset_holds_zero() -> None:
    spec = QuantizerSpec(2, signed=False, offset=True)
    scale, offset = scale_from_range(torch.tensor([3.0]), torch.tensor([6.0]), spec)
    assert offset is not None
    assert dequantize(torch.arange(4.0), scale, offset).tolist() == [0.0, 2.0, 4.0, 6.0]


@pytest.mark.parametrize('name', sorted(OBSERVERS))
def test_ranges_grow_over_batches(name: str) -> None:
    observer = make_observer(name)
    observer.observe(torch.tensor([[1.0, 2.0], [5.0, 6.0]]))
    observer.observe(torch.tensor([[-3.0, 0.0], [5.5, 9.0]]))
    assert observer.seen.low.tolist() == [-3.0, 5.0]
    assert observer.seen.high.tolist() == [2.0, 9.0]
    assert observer.elements == 4
    assert observer.signed


@pytest.mark.parametrize('name', sorted(OBSERVERS))
@pytest.mark.parametrize('wrong', [float('nan'), float('inf')])
def test_values_that_are_not_finite_are_refused(name: str, wrong: float) -> None:
    with pytest.raises(CalibrationError):
        make_observer(name).observe(torch.tensor([[1.0, wrong]]))


def test_unknown_observer() -> None:
    with pytest.raises(RecipeError, match='hessian'):
        make_observer('hessian')


def test_nothing_observed() -> None:
    with pytest.raises(CalibrationError):
        MinMaxObserver().propose(QuantizerSpec(4))


def test_min_max() -> None:
    observer = MinMaxObserver()
    observer.observe(torch.tensor([[-8.0, 3.0], [0.0, 14.0]]))
    scale, _ = observer.propose(QuantizerSpec(4))
    assert scale.tolist() == [1.0, 2.0]


def test_percentile() -> None:
    observer = PercentileObserver(0.9)
    observer.observe(torch.arange(101.0)[None])
    low, high = observer.range()
    assert low.item() == pytest.approx(10, abs=1e-3)
    assert high.item() == pytest.approx(90, abs=1e-3)
    with pytest.raises(RecipeError):
        PercentileObserver(0.3)


def error(values: Tensor, scale: Tensor, spec: QuantizerSpec) -> Tensor:
    restored = dequantize(quantize(values, scale, spec.qmin, spec.qmax), scale)
    return (restored - values).square().mean()


@pytest.mark.parametrize('bits', [2, 3, 4, 8])
def test_mse_is_close_to_the_best_of_all(bits: int) -> None:
    spec = QuantizerSpec(bits)
    generator = torch.Generator().manual_seed(bits)
    values = torch.randn(2, 1500, generator=generator) * torch.tensor([[1.0], [30.0]])
    values[0, 0] = 40.0
    observer = MSEObserver()
    observer.observe(values)
    scale, _ = observer.propose(spec)
    for row, found in zip(values, scale, strict=True):
        largest = float(row.abs().max()) / spec.qmax
        best = min(float(error(row, torch.tensor(s * largest), spec)) for s in torch.linspace(0.2, 1.0, 400).tolist())
        assert float(error(row, found, spec)) <= 1.05 * best


def test_mse_with_offset_beats_the_full_range() -> None:
    spec = QuantizerSpec(3, signed=False, offset=True)
    values = torch.cat([torch.rand(1000), torch.tensor([20.0])])[None]
    observer = MSEObserver()
    observer.observe(values)
    wide_scale, wide_offset = scale_from_range(*observer.seen, spec)
    scale, offset = observer.propose(spec)
    assert offset is not None and wide_offset is not None

    def loss(s: Tensor, z: Tensor) -> float:
        return float((dequantize(quantize(values, s, 0, 7, z), s, z) - values).square().mean())

    assert loss(scale, offset) <= loss(wide_scale, wide_offset)


def test_sample_is_bounded_and_leaves_the_random_state() -> None:
    state = torch.random.get_rng_state()
    sample = ColumnSample(limit=50)
    for _ in range(10):
        sample.add(torch.randn(3, 200, generator=torch.Generator().manual_seed(1)))
    assert sample.matrix().shape == (3, 50)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_sample_holds_an_equal_share_of_each_tensor() -> None:
    sample = ColumnSample(limit=1000)
    for number in range(10):
        sample.add(torch.full((1, 5000), float(number)))
    counts = sample.matrix().long().flatten().bincount(minlength=10)
    assert int(counts.sum()) == 1000
    assert 50 <= int(counts.min()) and int(counts.max()) <= 150


def test_one_tensor_fills_the_sample() -> None:
    sample = ColumnSample(limit=50)
    sample.add(torch.randn(2, 60))
    assert sample.matrix().shape == (2, 50)


def test_sample_keeps_columns_whole() -> None:
    sample = ColumnSample(limit=50)
    column = torch.arange(200.0)
    sample.add(torch.stack([column, 2 * column]))
    low, high = sample.matrix()
    assert torch.equal(high, 2 * low)


def test_vectors_of_a_layer() -> None:
    observer = VectorObserver()
    x = torch.randn(5, 3)
    observer.observe(x.t())
    found = observer.vectors()
    assert sorted(found.tolist()) == sorted(x.tolist())


def test_the_range_that_costs_least_is_each_rows_own() -> None:
    """Two bits without sign: the codes of 0 to 3 represent the first row, those of 0, 1/2, 1, 3/2 the second."""
    values = torch.tensor([[1.0, 2.0, 3.0], [0.5, 1.0, 1.5]])
    both = torch.ones(2)
    ranges = [Range(0 * both, 3 * both), Range(0 * both, 1.5 * both)]
    found = least_error(values, ranges, QuantizerSpec(2, signed=False))
    assert found.high.tolist() == [3.0, 1.5]


def test_percentiles_leave_out_what_is_alone() -> None:
    """One value of 4,000 that costs every other a coarse step is clipped, in its channel only."""
    spec = QuantizerSpec(2, signed=False, offset=True)
    even = torch.linspace(-1, 1, 4000)
    outlier = even.clone()
    outlier[7] = 20.0
    observer = VectorObserver(limit=4096)
    observer.observe(torch.stack([even, outlier]))
    low, high = observer.percentiles(spec)
    assert torch.allclose(low, torch.tensor(-1.0), atol=2e-3)
    assert torch.allclose(high, torch.tensor(1.0), atol=2e-3)
    assert observer.seen.high.tolist() == [1.0, 20.0]
    # At eight bits the step matters less than the one that is cut off.
    assert observer.percentiles(QuantizerSpec(8, signed=False, offset=True)).high[1] > 10
