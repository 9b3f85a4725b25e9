"""The fused attention is the written-out one, gradients included."""

from functools import partial

import pytest
import torch

from gplq.fused_attention import quantized_attention
from gplq.grid import Grid

LEAD, N, M, D = (3, 2), 5, 7, 4
BOUNDS = [(-8, 7), (-8, 7), (-8, 7), (0, 15)]


def written_out(lsq, query, key, value, mask, grids, rows=False):
    query, key, value = (lsq(x, grid) for x, grid in zip((query, key, value), grids, strict=False))
    scores = query @ key.transpose(-2, -1)
    if mask is not None:
        scores = scores + mask
    attention = scores.softmax(dim=-1)
    of_map = grids[3]
    if rows:
        of_map = of_map._replace(scale=of_map.scale * attention.detach().amax(dim=-1, keepdim=True))
    return lsq(attention, of_map) @ value


def grids_of(scales, factor=1.0):
    return tuple(Grid(scale, *bounds, None, factor) for scale, bounds in zip(scales, BOUNDS, strict=True))


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    return draw(*LEAD, N, D), draw(*LEAD, M, D), draw(*LEAD, M, D), draw(*LEAD, N, D)


@pytest.mark.parametrize('mask_shape', [None, (N, M), (2, N, M), (3, 1, N, M), (3, 2, N, M), (1, 2, 1, M)])
@pytest.mark.parametrize('scale_shape', [(1,), (2, 1, 1)])
@pytest.mark.parametrize('rows', [False, True])
def test_equals_the_written_out_attention(tensors, mask_shape, scale_shape, rows, written_out_lsq, monkeypatch):
    # Two heads at a time, so that the last part is smaller than the others.
    monkeypatch.setattr('gplq.fused_attention._CHUNK', {'cpu': 4 * N * M})
    *inputs, gradient = tensors
    mask = None if mask_shape is None else torch.randn(mask_shape, generator=torch.Generator().manual_seed(1))
    # Of the value a scale a column; large attention is clipped, so that both branches of LSQ's gradient count.
    scales = [torch.full(scale_shape, size) for size in (0.4, 0.5)]
    scales += [
        torch.linspace(0.3, 0.6, D).expand(*scale_shape[:-1], D).clone(),
        torch.full(scale_shape, 0.06 if rows else 0.03),
    ]
    found, expected = (
        [x.clone().requires_grad_() for x in (*inputs, *scales, *([] if mask is None else [mask]))] for _ in range(2)
    )
    outputs = []
    for leaves, run in ((found, quantized_attention), (expected, partial(written_out, written_out_lsq))):
        y = run(*leaves[:3], None if mask is None else leaves[7], grids_of(leaves[3:7], 0.5), rows=rows)
        y.backward(gradient)
        outputs.append(y)
    assert torch.allclose(outputs[0], outputs[1], atol=1e-6)
    telling = 0
    for number, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
        tolerance = torch.full_like(theirs.grad, 1e-5)
        if number in (3, 4, 5):
            # Rounding errors of query, key and value are kept in 254 steps, so that each is off by a uniform error; a
            # scale sums them, weighted by the gradients and the factor of 0.5. Six standard deviations.
            squares = expected[number - 3].grad.square().sum_to_size(theirs.shape)
            tolerance += 6 * 0.5 * squares.sqrt() / (254 * 12**0.5)
            telling += int((theirs.grad.abs() > 3 * tolerance).sum())
        assert bool(((mine.grad - theirs.grad).abs() <= tolerance + 1e-5 * theirs.grad.abs()).all()), number
    assert telling, 'gradients of 0 would pass'


def test_keeps_nothing_the_size_of_the_map(tensors):
    query, key, value, _ = (x.requires_grad_() for x in tensors)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        quantized_attention(query, key, value, None, grids_of([torch.tensor([0.1])] * 4))
    assert max(kept) < 3 * 2 * N * M


def test_autocast_multiplies_in_its_own_type(tensors, written_out_lsq):
    query, key, value, _ = tensors
    grids = grids_of([torch.tensor([0.1])] * 4)
    with torch.autocast('cpu', torch.bfloat16):
        y = quantized_attention(query, key, value, None, grids)
        expected = written_out(written_out_lsq, query, key, value, None, grids)
    assert y.dtype == expected.dtype == torch.bfloat16
    # The two add up in another order: one step of bfloat16 in the scores moves a code here and there, no more.
    close = torch.isclose(y.float(), expected.float(), rtol=2**-7, atol=1e-2)
    assert close.float().mean() > 0.9
    assert (y.float() - expected.float()).abs().max() <= 0.1 * value.abs().max() * 2


@pytest.mark.parametrize(('lead', 'queries'), [((), 5), ((4,), 0), ((4, 2), 0)])
@pytest.mark.parametrize('masked', [False, True])
def test_no_heads_and_no_queries(lead, queries, masked, written_out_lsq) -> None:
    query, key, value = torch.randn(*lead, queries, D), torch.randn(*lead, M, D), torch.randn(*lead, M, D)
    mask = torch.randn(*lead, queries, M) if masked else None
    grids = grids_of([torch.tensor([size]) for size in (0.4, 0.5, 0.4, 0.03)])
    y = quantized_attention(query, key, value, mask, grids)
    assert torch.allclose(y, written_out(written_out_lsq, query, key, value, mask, grids), atol=1e-6)
