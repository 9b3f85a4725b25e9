"""The fused attention is the written-out one, gradients included."""

import pytest
import torch

from gplq.functional import fake_quantize
from gplq.fused_attention import quantized_attention

LEAD, N, M, D = (3, 2), 5, 7, 4


def written_out(query, key, value, mask, scale, qmin, qmax, factor):
    scores = query @ key.transpose(-2, -1)
    if mask is not None:
        scores = scores + mask
    return fake_quantize(scores.softmax(dim=-1), scale, qmin, qmax, None, factor) @ value


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    return draw(*LEAD, N, D), draw(*LEAD, M, D), draw(*LEAD, M, D), draw(*LEAD, N, D)


@pytest.mark.parametrize('mask_shape', [None, (N, M), (2, N, M), (3, 1, N, M), (3, 2, N, M), (1, 2, 1, M)])
@pytest.mark.parametrize('scale_shape', [(1,), (2, 1, 1)])
def test_equals_the_written_out_attention(tensors, mask_shape, scale_shape, monkeypatch):
    # Two heads at a time, so that the last part is smaller than the others.
    monkeypatch.setattr('gplq.fused_attention._CHUNK', {'cpu': 4 * N * M})
    *inputs, gradient = tensors
    mask = None if mask_shape is None else torch.randn(mask_shape, generator=torch.Generator().manual_seed(1))
    # Large attention is clipped, so that both branches of LSQ's gradient count.
    scale = torch.full(scale_shape, 0.03)
    found, expected = (
        [x.clone().requires_grad_() for x in (*inputs, *([] if mask is None else [mask]), scale)] for _ in range(2)
    )
    outputs = []
    for function, leaves in ((quantized_attention, found), (written_out, expected)):
        *operands, steps = leaves
        given = operands if mask is not None else [*operands, None]
        y = function(*given, steps, 0, 15, 0.5)
        y.backward(gradient)
        outputs.append(y)
    assert torch.allclose(outputs[0], outputs[1], atol=1e-6)
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.allclose(mine.grad, theirs.grad, atol=1e-5), mine.shape


def test_keeps_nothing_the_size_of_the_map(tensors):
    query, key, value, _ = (x.requires_grad_() for x in tensors)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        quantized_attention(query, key, value, None, torch.tensor([0.1]), 0, 15)
    assert max(kept) < 3 * 2 * N * M


def test_autocast_multiplies_in_its_own_type(tensors):
    query, key, value, _ = tensors
    scale = torch.tensor([0.1])
    with torch.autocast('cpu', torch.bfloat16):
        y = quantized_attention(query, key, value, None, scale, 0, 15)
        expected = written_out(query, key, value, None, scale, 0, 15, 1.0)
    assert y.dtype == expected.dtype == torch.bfloat16
    # The two add up in another order: one step of bfloat16 in the scores moves a code here and there, no more.
    close = torch.isclose(y.float(), expected.float(), rtol=2**-7, atol=1e-2)
    assert close.float().mean() > 0.9
    assert (y.float() - expected.float()).abs().max() <= 0.1 * value.abs().max() * 2
