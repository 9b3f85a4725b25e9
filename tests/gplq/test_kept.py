"""Codes and rounding errors are all that backward needs of a quantized tensor."""

from __future__ import annotations

import pytest
import torch

from gplq.functional import fake_quantize
from gplq.grid import Grid
from gplq.kept import gradients, keep, restore

BOUNDS = [(-2, 1), (-4, 3), (-8, 7), (0, 15), (-16, 15), (-128, 127), (0, 255)]


@pytest.mark.parametrize(('qmin', 'qmax'), BOUNDS)
@pytest.mark.parametrize('shape', [(1,), (3, 5), (2, 3, 4)])
@pytest.mark.parametrize('shifted', [False, True])
def test_values_come_back_to_the_last_bit(qmin: int, qmax: int, shape: tuple[int, ...], shifted: bool) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * (qmax - qmin)
    offset = torch.full((shape[-1],), 0.3) if shifted else None
    grid = Grid(torch.rand(shape[-1], generator=torch.Generator().manual_seed(1)) + 0.5, qmin, qmax, offset)
    kept, values = keep(x, grid, torch.float32)
    assert torch.equal(values, fake_quantize(x, grid.scale, qmin, qmax, offset))
    assert torch.equal(restore(kept, grid, torch.float32), values)


@pytest.mark.parametrize(
    ('qmin', 'qmax', 'size'), [(-8, 7, 1.5), (0, 15, 1.5), (-2, 1, 1.5), (-16, 15, 2), (0, 255, 2)]
)
def test_bytes_a_value(qmin: int, qmax: int, size: float) -> None:
    kept, _ = keep(torch.randn(10, 10), Grid(torch.tensor(0.1), qmin, qmax), torch.float32)
    assert sum(part.numel() * part.element_size() for part in kept) == 100 * size


@pytest.mark.parametrize(('qmin', 'qmax'), BOUNDS)
@pytest.mark.parametrize('shifted', [False, True])
def test_gradients_are_those_of_written_out_lsq(qmin, qmax, shifted, written_out_lsq) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(40, 6, generator=generator) * (qmax - qmin) / 3).requires_grad_()
    scale = (torch.rand(6, generator=generator) + 0.5).requires_grad_()
    offset = torch.rand(6, generator=generator).requires_grad_() if shifted else None
    upstream = torch.randn(40, 6, generator=generator)
    written_out_lsq(x, Grid(scale, qmin, qmax, offset, 0.3)).backward(upstream)
    with torch.no_grad():
        kept, _ = keep(x, Grid(scale, qmin, qmax, offset), torch.float32)
        to_x, to_scale, to_offset = gradients(kept, upstream, Grid(scale, qmin, qmax, offset, 0.3), torch.float32)
    assert torch.allclose(to_x, x.grad, rtol=1e-6, atol=0), 'the reference divides and multiplies by the scale'
    # Errors are kept in steps of 1 / 254.
    assert ((to_scale - scale.grad).abs() <= 0.3 * upstream.abs().sum(0) / 508 + 1e-4).all()
    if shifted:
        assert torch.allclose(to_offset, offset.grad, atol=1e-5)


@pytest.mark.parametrize('own', [(6,), (1,), (), (1, 6), (7, 1), (7, 6), (7, 3, 6)])
@pytest.mark.parametrize(('qmin', 'qmax'), [(-4, 3), (0, 255)])
@pytest.mark.parametrize('contiguous', [True, False])
def test_a_few_rows_at_a_time_are_all_rows_at_once(own, qmin, qmax, contiguous, monkeypatch) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (7, 3, 5) if len(own) == 3 else (7, 5)
    own = tuple(5 if size == 6 else size for size in own)
    x, upstream = (torch.randn(shape, generator=generator) * qmax / 2 for _ in range(2))
    if not contiguous:
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    scale = torch.rand(own, generator=generator) + 0.5
    grid = Grid(scale, qmin, qmax, torch.rand(own, generator=generator), 0.3)
    results = []
    # Two rows at a time, the last alone; one element is less than a row.
    for together in (1 << 18, 10, 1):
        monkeypatch.setattr('gplq.kept._TOGETHER', together)
        kept, values = keep(x, grid, torch.bfloat16)
        assert torch.equal(restore(kept, grid, torch.bfloat16), values)
        # What is kept by a forward may be read by a backward that would round another number of rows.
        monkeypatch.setattr('gplq.kept._TOGETHER', 15)
        assert torch.equal(restore(kept, grid, torch.bfloat16), values)
        results.append((kept.errors, values, *gradients(kept, upstream, grid, torch.float32)))
    for few in results[1:]:
        for found, expected in zip(few, results[0], strict=True):
            assert found.dtype == expected.dtype
            assert torch.allclose(found.float(), expected.float(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(('elements', 'calls'), [(1 << 18, 1), (10, 4), (1, 7)])
def test_a_cpu_rounds_as_many_rows_as_fit(elements: int, calls: int, monkeypatch) -> None:
    seen = []
    monkeypatch.setattr('gplq.kept._TOGETHER', elements)
    monkeypatch.setattr('gplq.kept.steps_of', lambda x, grid: seen.append(x.shape) or x / grid.scale)
    keep(torch.randn(7, 5), Grid(torch.tensor(0.5), -8, 7), torch.float32)
    assert len(seen) == calls
    assert sum(shape[0] for shape in seen) == 7


def test_memory_order_is_that_of_the_input() -> None:
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    grid = Grid(torch.tensor(0.5), -8, 7)
    kept, values = keep(x, grid, torch.bfloat16)
    found = values, restore(kept, grid, torch.float32), gradients(kept, x, grid, torch.float32)[0]
    assert {y.stride() for y in found} == {x.stride()}


def test_no_rows_and_no_dimensions() -> None:
    for x in (torch.empty(0, 4), torch.tensor(0.7)):
        grid = Grid(torch.tensor(0.5), -8, 7)
        kept, values = keep(x, grid, torch.float32)
        assert torch.equal(values, (x / 0.5).round() * 0.5)
        assert gradients(kept, torch.ones_like(x), grid, torch.float32)[0].shape == x.shape


@pytest.mark.parametrize('short', [1e-7, 1e-3, 0.4])
def test_what_is_just_within_the_bounds_is_not_clipped(short: float) -> None:
    # The kept error of values this close to a code is none, whether or not they are clipped.
    x = torch.tensor([-8 + 8 * short, 7 - 7 * short, -8.0, 7.0, -8.3, 7.3])
    grid = Grid(torch.tensor(1.0), -8, 7)
    kept, _ = keep(x, grid, torch.float32)
    to_x, to_scale, _ = gradients(kept, torch.ones(6), grid, torch.float32)
    assert to_x.tolist() == [1, 1, 0, 0, 0, 0]
    error = float((x[:2].round() - x[:2]).sum())
    assert abs(float(to_scale) - (error - 8 + 7 - 8 + 7)) < 2 / 254
