"""The linear layer that keeps codes is the written-out one, gradients included."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from gplq.grid import Grid
from gplq.quantized_linear import quantized_linear


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('shifted', [False, True])
@pytest.mark.parametrize('scales', [1, 6])
@pytest.mark.parametrize('precision', [None, torch.bfloat16])
def test_equals_the_written_out_layer(written_out_lsq, bias, shifted, scales, precision) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(3, 5, 6, generator=generator), torch.randn(4, 6, generator=generator)
    given = {
        'x': x,
        'weight': weight,
        'bias': torch.randn(4, generator=generator) if bias else None,
        'scale': torch.rand(scales, generator=generator) * 0.2 + 0.1,
        'offset': torch.rand(scales, generator=generator) if shifted else None,
    }
    upstream = torch.randn(3, 5, 4, generator=generator)
    results = []
    for fused in (True, False):
        leaves = {name: None if t is None else t.clone().requires_grad_() for name, t in given.items()}
        grid = Grid(leaves['scale'], -8, 7, leaves['offset'], 0.5)
        with torch.autocast('cpu', torch.bfloat16, enabled=precision is not None):
            if fused:
                y = quantized_linear(leaves['x'], leaves['weight'], leaves['bias'], grid)
            else:
                y = F.linear(written_out_lsq(leaves['x'], grid), leaves['weight'], leaves['bias'])
        y.backward(upstream.to(y.dtype))
        results.append((y, {name: t.grad for name, t in leaves.items() if t is not None}))
    (found, mine), (expected, theirs) = results
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)
    tolerance = dict(rtol=1e-5, atol=1e-5) if precision is None else dict(rtol=2**-7, atol=2**-6)
    for name in theirs:
        assert mine[name].dtype == theirs[name].dtype
        if name == 'scale':
            continue
        assert torch.allclose(mine[name], theirs[name], **tolerance), name
    incoming = (upstream @ weight).abs()
    bound = 0.5 * (incoming.sum((0, 1)) if scales > 1 else incoming.sum()) / 508
    assert ((mine['scale'] - theirs['scale']).abs() <= bound * (1 if precision is None else 8)).all()


def test_keeps_a_byte_and_a_half_a_value() -> None:
    x, weight = torch.randn(8, 32, requires_grad=True), torch.randn(16, 32, requires_grad=True)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        quantized_linear(x, weight, None, Grid(torch.tensor(0.3, requires_grad=True), -8, 7))
    parameters = {weight.data_ptr()}
    assert sum(t.numel() * t.element_size() for t in kept if t.data_ptr() not in parameters) == 8 * 32 * 1.5 + 4


@pytest.mark.parametrize('trained', ['x', 'weight', 'bias', 'scale', 'offset'])
def test_each_gradient_comes_without_the_others(trained, written_out_lsq) -> None:
    generator = torch.Generator().manual_seed(0)
    results = []
    given = {
        'x': torch.randn(5, 6, generator=generator),
        'weight': torch.randn(4, 6, generator=generator),
        'bias': torch.randn(4, generator=generator),
        'scale': torch.full((6,), 0.1),
        'offset': torch.rand(6, generator=generator),
    }
    for fused in (True, False):
        leaves = {name: x.clone().requires_grad_(name == trained) for name, x in given.items()}
        grid = Grid(leaves['scale'], -8, 7, leaves['offset'])
        if fused:
            y = quantized_linear(leaves['x'], leaves['weight'], leaves['bias'], grid)
        else:
            y = F.linear(written_out_lsq(leaves['x'], grid), leaves['weight'], leaves['bias'])
        y.square().sum().backward()
        results.append(leaves)
    mine, theirs = results
    assert float(theirs[trained].grad.abs().max()) > 0
    assert torch.allclose(mine[trained].grad, theirs[trained].grad, rtol=0.01)
    assert all(leaf.grad is None for name, leaf in mine.items() if name != trained)


def test_autocast_leaves_double_precision_alone() -> None:
    x, weight = torch.randn(3, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    with torch.autocast('cpu', torch.bfloat16):
        assert quantized_linear(x, weight, None, Grid(torch.tensor(0.1), -8, 7)).dtype == F.linear(x, weight).dtype
