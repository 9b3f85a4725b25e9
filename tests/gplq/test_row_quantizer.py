"""Each row of an attention map in units of its own largest value."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import gplq
from gplq import integer
from gplq.grid import Grid
from gplq.products import QuantizedProduct
from gplq.quantizer import Quantizer
from gplq.record import named_products, named_quantizers
from gplq.row_quantizer import RowQuantizer, row_units
from gplq.spec import QuantizerSpec, Scheme


def settled(
    scheme: Scheme = 'row', bits: int = 2, shape: tuple[int, ...] = (1,), signed: bool = False, merged: int = 0
) -> RowQuantizer:
    quantizer = RowQuantizer(QuantizerSpec(bits, signed, 'head', scheme=scheme), shape, merged)
    quantizer.initialize(torch.tensor(1 / quantizer.spec.qmax).expand(shape), None, signed=signed, elements=1)
    return quantizer


def test_by_hand() -> None:
    """Two bits, codes 0 to 3: thirds of each row's largest value."""
    x = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.6, 0.3, 0.1, 0.0], [0.0, 0.0, 0.0, 0.0]])
    # 0.3 / 0.2 = 1.5 goes to the even 2, 0.1 / 0.2 = 0.5 to 0.
    x[1] += torch.tensor([0.0, 0.01, 0.01, 0.0])
    quantizer = settled()
    assert quantizer.codes(x).tolist() == [[3, 3, 3, 3], [3, 2, 1, 0], [0, 0, 0, 0]]
    expected = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.6, 0.4, 0.2, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert torch.allclose(quantizer(x), expected)


def test_signed_rows_by_their_size() -> None:
    x = torch.tensor([[-6.0, 3.0, 1.1]])
    quantizer = settled(bits=3, signed=True)
    # The scale is a third of the largest size: steps of 2.
    assert quantizer.codes(x).tolist() == [[-3, 2, 1]]
    assert torch.allclose(quantizer(x), torch.tensor([[-6.0, 4.0, 2.0]]))


def test_a_column_is_a_row_of_the_transpose() -> None:
    x = torch.rand(3, 4, 5)
    assert torch.equal(settled('column')(x), settled('row')(x.mT).mT)
    assert torch.equal(settled('column').codes(x), settled('row').codes(x.mT).mT)


@pytest.mark.parametrize('factor', [1e-6, 3.0, 1e6])
def test_codes_do_not_depend_on_the_size_of_a_row(factor: float) -> None:
    x = torch.rand(2, 6, 7)
    assert torch.equal(settled(bits=4).codes(x * factor), settled(bits=4).codes(x))


@pytest.mark.parametrize('tokens', [2, 64, 4096])
def test_a_row_that_looks_everywhere_is_kept(tokens: int) -> None:
    """One scale for a row that looks at one position and one that looks at all rounds the latter to zero."""
    x = torch.stack([torch.eye(tokens)[0], torch.full((tokens,), 1 / tokens)])
    assert torch.allclose(settled()(x), x)
    uniform = Quantizer(QuantizerSpec(2, False), (1,))
    uniform.initialize(torch.tensor(1 / 3), None, signed=False, elements=1)
    assert bool((uniform(x)[1] == 0).all()) == (tokens > 6)


def test_heads_merged_into_the_batch() -> None:
    apart, merged = settled(shape=(2, 1, 1)), settled(shape=(2, 1, 1), merged=2)
    for quantizer in (apart, merged):
        with torch.no_grad():
            quantizer.log_scale[1] += 0.3
    x = torch.rand(3, 2, 4, 5)
    flat = x.reshape(6, 4, 5)
    assert torch.equal(merged(flat), apart(x).reshape(6, 4, 5))
    assert torch.equal(merged.codes(flat), apart.codes(x).reshape(6, 4, 5))
    assert torch.allclose(merged.codes(flat) * merged.scale_of(flat), merged(flat))


def test_gradients_are_lsq_s_with_the_units_held(written_out_lsq: Callable[[Tensor, Grid], Tensor]) -> None:
    x = torch.rand(3, 2, 4, 5)
    quantizer = settled(bits=3, shape=(2, 1, 1))
    with torch.no_grad():
        quantizer.log_scale.sub_(0.2)
    mine, theirs = (x.clone().requires_grad_() for _ in range(2))
    log_scale = quantizer.log_scale.detach().clone().requires_grad_()
    upstream = torch.randn_like(x)
    (quantizer(mine) * upstream).sum().backward()
    grid = Grid(log_scale.exp() * row_units(x), 0, 7, None, quantizer.scale_gradient)
    (written_out_lsq(theirs, grid) * upstream).sum().backward()
    assert torch.allclose(mine.grad, theirs.grad)  # type: ignore[arg-type]
    assert quantizer.log_scale.grad is not None and log_scale.grad is not None
    # Rounding errors are kept in steps of 1 / 254.
    slack = quantizer.scale_gradient * float(upstream.abs().sum()) / 508
    assert float((quantizer.log_scale.grad - log_scale.grad).abs().max()) < slack < float(log_scale.grad.abs().max())


@pytest.mark.parametrize('scheme', ['row', 'column'])
def test_its_product_is_one_of_integers(scheme: Scheme) -> None:
    attention, value = torch.rand(3, 2, 4, 5), torch.randn(3, 2, 5, 6)
    of_value = Quantizer(QuantizerSpec(4, True, 'head'), (2, 1, 1))
    of_value.initialize(torch.tensor([0.2, 0.3]), None, signed=True, elements=1)
    operands = (settled(bits=4, shape=(2, 1, 1)), of_value)
    left, right = attention, value
    if scheme == 'column':
        operands, (left, right) = (of_value, settled('column', 4, (2, 1, 1))), (value.mT, attention.mT)
    product = QuantizedProduct(0, ('left', 'right'), operands)
    y = product(left, right, torch.matmul)
    assert torch.allclose(y, operands[0](left) @ operands[1](right), atol=1e-6)
    assert torch.allclose(integer.product_from_codes(product, left, right), y, atol=1e-5)


class MapOnTheRight(nn.Module):
    """Values, transposed, times a map whose columns sum to one."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 2
        self.qkv = nn.Linear(8, 24)
        self.proj = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
        y = v.mT @ (k @ q.mT).softmax(dim=-2)
        result: Tensor = self.proj(y.flatten(1, 2).mT).mean(1)
        return result


def test_a_map_on_the_right_has_columns(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = MapOnTheRight().eval(), torch.randn(5, 7, 8)
    exact = model(x)
    gplq.prepare(model, 'w8a8', x[:1])
    gplq.calibrate(model, [x])
    assert torch.allclose(model(x), exact, atol=0.05)
    gplq.quantize_weights(model, [x])
    schemes = {name.rpartition(':')[2]: q.spec.scheme for name, q in named_quantizers(model)}
    assert (schemes['attention_map'], schemes['value']) == ('column', 'uniform')
    seen = {}
    for name, product in named_products(model):
        product.watcher = lambda *tensors, name=name: seen.__setitem__(name, tensors)
    y = model(x)
    for name, product in named_products(model):
        left, right, found = seen[name]
        assert torch.allclose(integer.product_from_codes(product, left, right), found, atol=1e-5)
        product.watcher = None
    gplq.save(model, tmp_path / 'model.safetensors')
    assert torch.equal(gplq.load(MapOnTheRight(), tmp_path / 'model.safetensors').eval()(x), y)


def test_what_lies_on_which_scale(toy_vit: Callable[..., nn.Module], images: Tensor) -> None:
    """A head each has one to learn, which starts where the largest value is the last code."""
    model = toy_vit()
    gplq.prepare(model, gplq.Recipe.gplq(4, 3), images[:2])
    gplq.calibrate(model, [images])
    maps = [q for name, q in named_quantizers(model) if name.endswith(':attention_map')]
    assert maps
    for quantizer in maps:
        assert isinstance(quantizer, RowQuantizer) and not quantizer.spec.signed
        assert torch.allclose(quantizer.scale, torch.tensor(1 / 7))
        assert quantizer.shape == (model.blocks[0].attn.num_heads, 1, 1)  # type: ignore[index, union-attr]


def test_the_peers_have_one_scale_for_all_rows() -> None:
    for name in ('paper', 'rtn', 'gptq', 'vvtq'):
        assert getattr(gplq.Recipe, name)().attention_map == 'uniform', name
    assert gplq.Recipe.gplq().attention_map == 'row'
