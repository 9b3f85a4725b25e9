"""Queries and keys are evened out exactly, or not at all."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import gplq
from gplq.batches import default_forward
from gplq.equalize import equalize_queries_and_keys


def unbalanced(model: nn.Module) -> nn.Module:
    """A few query channels much larger than the keys they meet; the function stays."""
    with torch.no_grad():
        for block in model.blocks:  # type: ignore[union-attr]
            qkv = block.attn.qkv
            for row in (1, 9):
                qkv.weight[row] *= 32
                qkv.bias[row] *= 32
                qkv.weight[16 + row] /= 32
                qkv.bias[16 + row] /= 32
    return model


def prepared(model: nn.Module, images: Tensor) -> nn.Module:
    gplq.prepare(model, 'w4a4', images[:2])
    return model


@pytest.mark.parametrize('fused', [False, True])
def test_the_function_stays_and_the_rows_meet(toy_vit: Callable[..., nn.Module], images: Tensor, fused: bool) -> None:
    model = prepared(unbalanced(toy_vit(fused=fused)), images)
    with torch.no_grad():
        expected = model(images)
        assert equalize_queries_and_keys(model, [images], default_forward) == 2
        assert torch.allclose(model(images), expected, atol=1e-4)
        norm = model.blocks[0].norm1  # type: ignore[index, union-attr]
        attention = model.blocks[0].attn  # type: ignore[index, union-attr]
        patches = model.patch_embed(images).flatten(2).transpose(1, 2)  # type: ignore[operator]
        q, k, _ = attention.qkv(norm(patches)).chunk(3, -1)
    # The queries meet the keys after their factor 1 / sqrt(8); it is the same for every channel.
    ratio = q.abs().amax((0, 1)) / k.abs().amax((0, 1))
    assert torch.allclose(ratio, torch.full((16,), 8**0.5), rtol=1e-3)


@pytest.mark.parametrize('settings', [{'relative': True}, {'norm': True}], ids=str)
def test_refused_where_something_else_reads_queries(
    toy_vit: Callable[..., nn.Module], images: Tensor, settings: dict[str, bool]
) -> None:
    model = prepared(unbalanced(toy_vit(**settings)), images)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        assert equalize_queries_and_keys(model, [images], default_forward) == 0
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())


class Rotary(nn.Module):
    """An attention whose queries and keys are rotated by their position."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 2
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 2, 8).permute(2, 0, 3, 1, 4)
        angle = torch.arange(n)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.03])

        def rotate(t: Tensor) -> Tensor:
            a, c = t.chunk(2, -1)
            return torch.cat([a * angle.cos() - c * angle.sin(), a * angle.sin() + c * angle.cos()], -1)

        y = (rotate(q) @ rotate(k).transpose(-2, -1)).softmax(-1) @ v
        return y.transpose(1, 2).reshape(b, n, 16)


def test_refused_with_rotary_embeddings() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Rotary(), nn.Linear(16, 16)).eval()
    with torch.no_grad():
        model[0].qkv.weight[1] *= 32
        model[0].qkv.weight[17] /= 32
    x = torch.randn(8, 6, 16)
    gplq.prepare(model, 'w4a4', x)
    with torch.no_grad():
        assert equalize_queries_and_keys(model, [x], default_forward) == 0
