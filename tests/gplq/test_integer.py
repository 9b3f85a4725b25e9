"""What integers give is what the quantized model evaluates: attention by einsum, and the compensation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gplq
from gplq import integer
from gplq.layers import LinearCompensation
from gplq.record import named_products

EQUATIONS = ('bhnd,bhmd->bhnm', 'bhnm,bhmd->bhnd')


class EinsumAttention(nn.Module):
    """Attention whose keys are not transposed: no matrix product of its operands as they come."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 2
        self.qkv = nn.Linear(8, 24)
        self.proj = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, 2, 4).permute(2, 0, 3, 1, 4)
        attention = torch.einsum(EQUATIONS[0], q, k).softmax(dim=-1)
        y: Tensor = self.proj(torch.einsum(EQUATIONS[1], attention, v).transpose(1, 2).reshape(batch, tokens, 8))
        return y


# As many tokens as channels a head: a plain product of queries and keys would run, and be wrong.
@pytest.mark.parametrize('tokens', [4, 6])
def test_attention_by_einsum(tokens: int) -> None:
    torch.manual_seed(0)
    model, x = EinsumAttention().eval(), torch.randn(3, tokens, 8)
    gplq.prepare(model, 'w4a4', x[:1])
    gplq.calibrate(model, [x])
    seen: dict[str, tuple[Tensor, ...]] = {}
    products = dict(named_products(model))
    assert len(products) == 2
    for name, product in products.items():
        product.watcher = lambda *tensors, name=name: seen.__setitem__(name, tensors)
    with torch.no_grad():
        model(x)
    for (name, product), equation in zip(products.items(), EQUATIONS, strict=True):
        left, right, y = seen[name]

        def multiply(a: Tensor, b: Tensor, equation: str = equation) -> Tensor:
            return torch.einsum(equation, a, b)

        assert torch.allclose(integer.product_from_codes(product, left, right, multiply), y, atol=1e-5)


def test_compensation_by_hand() -> None:
    """Inputs up to 127 have a step of 1; so has the second column, whose largest weight is 127, the first 1/127."""
    layer = LinearCompensation(2, 8)
    layer.fit(torch.tensor([[1.0, 0.0], [0.0, 127.0]]), torch.tensor([0.5, -1.0]), torch.tensor([127.0, 127.0]))
    x = torch.tensor([[3.2, 4.4], [200.0, -0.6]])
    expected = torch.tensor([[3.5, 507.0], [127.5, -128.0]])
    assert torch.allclose(integer.compensation_from_codes(layer, x), expected)
    assert torch.allclose(layer(x), expected)


@pytest.mark.parametrize('bits', [4, 8])
def test_a_compensated_model(quantized: Callable[..., nn.Module], images: Tensor, bits: int) -> None:
    model = quantized(gplq.Recipe.paper(compensation_bits=bits))
    seen: list[tuple[LinearCompensation, Tensor, Tensor]] = []

    def keep(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        assert isinstance(module, LinearCompensation)
        seen.append((module, args[0], output))

    for module in model.modules():
        if isinstance(module, LinearCompensation):
            module.register_forward_hook(keep)
    with torch.no_grad():
        model(images)
    assert seen
    for layer, x, y in seen:
        assert float(y.abs().max()) > 0
        assert torch.allclose(integer.compensation_from_codes(layer, x), y, atol=1e-5)
