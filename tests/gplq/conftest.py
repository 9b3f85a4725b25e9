"""A small vision transformer in plain torch, the data that go with it, and its twin with outlier channels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gplq
from gplq.grid import Grid


class Attention(nn.Module):
    """Self-attention with explicit products or the fused kernel, with or without relative positions."""

    def __init__(self, width: int, heads: int, tokens: int, *, fused: bool, relative: bool, norm: bool) -> None:
        super().__init__()
        self.num_heads = heads
        self.scale = (width // heads) ** -0.5
        self.fused = fused
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.position = nn.Parameter(torch.randn(tokens, width // heads)) if relative else None
        self.norm = nn.LayerNorm(width // heads) if norm else None

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        if self.norm is not None:
            q, k = self.norm(q), self.norm(k)
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            scores = (q * self.scale) @ k.transpose(-2, -1)
            if self.position is not None:
                scores = scores + q @ self.position.t()
            y = scores.softmax(dim=-1) @ v
        return self.proj(y.transpose(1, 2).reshape(batch, tokens, width))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, attention: nn.Module) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = attention
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 2 * width)
        self.fc2 = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class ToyViT(nn.Module):
    """Patch embedding, blocks, pooled classifier: images ``(batch, 3, 16, 16)`` to five logits."""

    def __init__(
        self,
        width: int = 16,
        depth: int = 2,
        heads: int = 2,
        *,
        fused: bool = False,
        relative: bool = False,
        norm: bool = False,
    ) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, width, 4, 4)
        self.blocks = nn.ModuleList(
            Block(width, Attention(width, heads, 16, fused=fused, relative=relative, norm=norm)) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x).mean(1))
        return logits


def _make(**settings: object) -> ToyViT:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ToyViT(**settings)  # type: ignore[arg-type]
        with torch.no_grad():
            for name, p in model.named_parameters():
                if p.dim() > 1:
                    p.copy_(torch.randn_like(p) / p[0].numel() ** 0.5)
                elif 'norm' in name and name.endswith('weight'):
                    p.copy_(1 + 0.2 * torch.randn_like(p))
                else:
                    p.copy_(0.1 * torch.randn_like(p))
    return model.eval()


@pytest.fixture
def toy_vit() -> Callable[..., nn.Module]:
    """Makes the small vision transformer, the same weights each time; see :class:`ToyViT` for its settings."""
    return _make


@pytest.fixture
def images() -> Tensor:
    """Sixteen images ``(16, 3, 16, 16)``."""
    return torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def quantized(toy_vit: Callable[..., nn.Module], images: Tensor) -> Callable[..., nn.Module]:
    """Makes a small vision transformer that went through both stages but for training."""

    def make(recipe: gplq.Recipe | str = 'w4a4', **settings: object) -> nn.Module:
        model = toy_vit(**settings)
        gplq.prepare(model, recipe, images[:2])
        gplq.calibrate(model, [images])
        gplq.quantize_weights(model, [images])
        return model

    return make


@pytest.fixture
def relative_error() -> Callable[[Tensor, Tensor], float]:
    """``||found - expected|| / ||expected - mean over the batch||``."""

    def measure(found: Tensor, expected: Tensor) -> float:
        return float((found - expected).norm() / (expected - expected.mean(0)).norm())

    return measure


@pytest.fixture(scope='session')
def written_out_lsq() -> Callable[[Tensor, Grid], Tensor]:
    """LSQ as its paper's code writes it, its gradients autograd's: a reference for what is written by hand."""

    def fake_quantize(x: Tensor, grid: Grid) -> Tensor:
        def scaled(parameter: Tensor) -> Tensor:
            return parameter * grid.factor + (parameter - parameter * grid.factor).detach()

        scale = scaled(grid.scale)
        offset = 0.0 if grid.offset is None else scaled(grid.offset)
        steps = (x / scale - offset).clamp(grid.qmin, grid.qmax)
        codes = steps + (steps.round() - steps).detach()
        return ((codes + offset) * scale).to(x.dtype)

    return fake_quantize
