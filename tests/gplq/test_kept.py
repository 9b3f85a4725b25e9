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
    kept, values = keep(x, grid)
    assert torch.equal(values, fake_quantize(x, grid.scale, qmin, qmax, offset))
    assert torch.equal(restore(kept, grid), values)


@pytest.mark.parametrize(
    ('qmin', 'qmax', 'size'), [(-8, 7, 1.5), (0, 15, 1.5), (-2, 1, 1.5), (-16, 15, 2), (0, 255, 2)]
)
def test_bytes_a_value(qmin: int, qmax: int, size: float) -> None:
    kept, _ = keep(torch.randn(10, 10), Grid(torch.tensor(0.1), qmin, qmax))
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
        kept, _ = keep(x, Grid(scale, qmin, qmax, offset))
        to_x, to_scale, to_offset = gradients(kept, upstream, Grid(scale, qmin, qmax, offset, 0.3))
    assert torch.allclose(to_x, x.grad, rtol=1e-6, atol=0), 'the reference divides and multiplies by the scale'
    # Errors are kept in steps of 1 / 254.
    assert ((to_scale - scale.grad).abs() <= 0.3 * upstream.abs().sum(0) / 508 + 1e-4).all()
    if shifted:
        assert torch.allclose(to_offset, offset.grad, atol=1e-5)
