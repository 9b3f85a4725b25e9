"""Quantizers whose codes have two parts: twin uniform (PTQ4ViT) and powers of the root of two (RepQ-ViT)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import gplq
from gplq import integer
from gplq.errors import CalibrationError, RecipeError, TargetError
from gplq.log_sqrt2 import log_sqrt2_levels, log_sqrt2_parts
from gplq.record import named_products, named_quantizers, weight_views
from gplq.spec import QuantizerSpec
from gplq.twin_uniform import twin_parts, twin_table
from gplq.two_part import TwoPartQuantizer, TwoPartScale, candidates, parts_of, propose, steps_of_parts

Make = Callable[..., nn.Module]
ONE = torch.ones(1)


def test_twin_codes_of_three_bits_by_hand() -> None:
    # One bit says which half, two are left: four fine codes and four coarse ones, zero in both.
    assert twin_table(3, shift=2, signed=False).tolist() == [0, 1, 2, 3, 4, 8, 12]
    # A coarse step as large as the fine half and one more has no gap; a larger one has.
    assert twin_table(3, shift=3, signed=False).tolist() == [0, 1, 2, 3, 8, 16, 24]
    # GELU: negative values are fine, positive ones coarse.
    assert twin_table(3, shift=1, signed=True).tolist() == [-4, -3, -2, -1, 0, 2, 4, 6]
    assert twin_table(2, shift=0, signed=True).tolist() == [-2, -1, 0, 1]


@pytest.mark.parametrize(('low', 'high'), [(-1.0, 0.01), (-0.17, 0.02), (-0.17, 0.1), (-1.0, 0.0), (-0.17, 5.0)])
@pytest.mark.parametrize('bits', [3, 4, 6, 8])
def test_twin_is_no_worse_than_uniform_whichever_side_is_the_longer(low: float, high: float, bits: int) -> None:
    values = torch.rand(1, 5000, generator=torch.Generator().manual_seed(0)) * (high - low) + low
    spec = QuantizerSpec(bits, signed=True, granularity='tensor', scheme='twin_uniform')
    scale = TwoPartScale(*(t[:, None] for t in propose(values, values.amin(1), values.amax(1), spec)))
    twin = steps_of_parts(parts_of(values, scale, spec)) * scale.scale
    step = max(high / (2 ** (bits - 1) - 1), -low / 2 ** (bits - 1))
    uniform = (values / step).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * step
    assert float((twin - values).norm()) <= 1.01 * float((uniform - values).norm())


@pytest.mark.parametrize('signed', [False, True])
@pytest.mark.parametrize('bits', [2, 3, 4, 8])
@pytest.mark.parametrize('shift', [0, 1, 4, 15])
def test_twin_takes_the_nearest_value_and_one_half(bits: int, shift: int, signed: bool) -> None:
    table = twin_table(bits, shift, signed).double()
    x = torch.randn(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.cat([x * table.max() / 2, x * 2 ** (bits - 1)]) if signed else x.abs() * table.max()
    scale = torch.tensor([0.37], dtype=torch.float64)
    fine, coarse = twin_parts(x * scale, scale, torch.tensor([float(shift)]), bits, signed)
    assert not bool(((fine != 0) & (coarse != 0)).any())
    found = fine + 2.0**shift * coarse
    assert set(found.tolist()) <= set(table.tolist())
    least = (x[:, None] - table).abs().amin(dim=1)
    assert torch.allclose((found - x).abs(), least, atol=1e-9)


def test_powers_of_the_root_of_two_by_hand() -> None:
    assert [log_sqrt2_levels(bits) for bits in (2, 3, 4, 5, 8)] == [3, 7, 15, 31, 31]
    values = torch.tensor([0.0, 0.3, 1.0, 1.4, 2.0, 2.9, 4.1, 5.6, 8.0, 100.0])
    even, odd = log_sqrt2_parts(values, ONE, 3)
    assert even.tolist() == [0, 0, 1, 0, 2, 0, 4, 0, 8, 8]
    assert odd.tolist() == [0, 0, 0, 1, 0, 2, 0, 4, 0, 0]


@pytest.mark.parametrize('bits', [2, 3, 4, 8])
def test_powers_are_nearest_in_the_logarithm(bits: int) -> None:
    levels = math.sqrt(2) ** torch.arange(log_sqrt2_levels(bits), dtype=torch.float64)
    x = levels.max() * torch.rand(2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1
    even, odd = log_sqrt2_parts(x, ONE.double(), bits)
    nearest = levels[(x.log()[:, None] - levels.log()).abs().argmin(dim=1)]
    assert torch.allclose(even + math.sqrt(2) * odd, nearest)


@pytest.mark.parametrize('scheme', ['twin_uniform', 'log_sqrt2'])
def test_the_proposal_is_the_best_candidate(scheme: str) -> None:
    spec = QuantizerSpec(4, signed=False, granularity='head', scheme=scheme)
    maps = torch.randn(2, 50, 50, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 6.0])[:, None, None]
    values = maps.softmax(dim=-1).flatten(1)
    low, high = values.amin(1), values.amax(1)

    def errors(chosen) -> Tensor:
        wide = type(chosen)(*(t[:, None] for t in chosen))
        return (steps_of_parts(parts_of(values, wide, spec)) * wide.scale - values).square().mean(dim=1)

    best = errors(propose(values, low, high, spec))
    assert torch.equal(best, torch.stack([errors(one) for one in candidates(low, high, spec)]).amin(dim=0))


def prepared(toy_vit: Make, images: Tensor, bits: int, **settings) -> nn.Module:
    model = toy_vit()
    gplq.prepare(model, gplq.Recipe.gplq(bits, bits, **settings), images[:2])
    gplq.calibrate(model, [images])
    return model


@pytest.mark.parametrize('fused', [False, True])
@pytest.mark.parametrize('bits', [2, 4, 8])
@pytest.mark.parametrize('scheme', ['twin_uniform', 'log_sqrt2'])
def test_products_are_those_of_the_parts(scheme: str, bits: int, fused: bool, toy_vit: Make, images: Tensor) -> None:
    model = toy_vit(fused=fused)
    gplq.prepare(model, gplq.Recipe.gplq(bits, bits, attention_map=scheme, gelu_output='twin_uniform'), images[:2])
    gplq.calibrate(model, [images])
    gplq.quantize_weights(model, [images])
    seen: dict[str, tuple[Tensor, ...]] = {}
    products = dict(named_products(model))
    for name, product in products.items():
        product.watcher = lambda *tensors, name=name: seen.__setitem__(name, tensors)
    inputs: dict[str, Tensor] = {}
    views = {view.name: view for _, view in weight_views(model) if view.name.endswith('fc2')}
    for name, view in views.items():
        view.owner.register_forward_hook(lambda m, args, y, name=name: inputs.__setitem__(name, (args[0], y)))
    with torch.no_grad():
        model(images)
    for name, product in products.items():
        left, right, y = seen[name]
        assert torch.allclose(integer.product_from_codes(product, left, right), y, atol=1e-5)
    assert any(isinstance(q, TwoPartQuantizer) and len(q.shape) > 1 for _, q in named_quantizers(model))
    for name, view in views.items():
        x, y = inputs[name]
        assert isinstance(view.map.input, TwoPartQuantizer)
        assert torch.allclose(integer.linear_from_codes(view, x), y, atol=1e-4)
        # Both halves are integer products of whole codes; the coarse one is shifted before they are added.
        fine, coarse = view.map.input.parts(x)
        shift = int(view.map.input.shift)
        assert float(coarse.factor) == 2**shift
        weight = integer.integer_linear(view)
        whole = fine.codes.long() @ weight.codes.t() + ((coarse.codes.long() @ weight.codes.t()) << shift)
        assert torch.allclose(whole * weight.scale + weight.bias, y, atol=1e-4)


def test_gradients_are_straight_through_and_lsq() -> None:
    quantizer = TwoPartQuantizer(QuantizerSpec(3, signed=True, scheme='twin_uniform'), (1,))
    quantizer.initialize(torch.tensor([0.5]), None, signed=True, elements=4)
    quantizer.set_shift(torch.tensor([1.0]))
    # In steps of 0.5: inside, inside, below the least of -4, above the largest of 6.
    x = torch.tensor([-0.6, 0.9, -3.0, 4.0], requires_grad=True)
    y = quantizer(x)
    assert y.tolist() == [-0.5, 1.0, -2.0, 3.0]
    y.sum().backward()
    assert x.grad.tolist() == [1.0, 1.0, 0.0, 0.0]
    # d y / d log s = s * (code - x / s) inside, s * bound outside (Esser et al. 2020, eq. 3), times 1 / sqrt(n qmax).
    slope = 0.5 * ((-1 + 1.2) + (2 - 1.8) - 4 + 6)
    assert float(quantizer.log_scale.grad) == pytest.approx(slope / math.sqrt(4 * 3), rel=1e-5)


def test_training_saving_and_loading(toy_vit: Make, images: Tensor, tmp_path: Path) -> None:
    model = prepared(toy_vit, images, 4, attention_map='twin_uniform', gelu_output='twin_uniform')
    before = {name: q.log_scale.detach().clone() for name, q in named_quantizers(model)}
    labels = torch.arange(len(images)) % 5
    gplq.train_activations(model, [(images, labels)], stage=gplq.ActivationStage(scale_lr=1e-2))
    assert all(not torch.equal(q.log_scale, before[name]) for name, q in named_quantizers(model))
    gplq.quantize_weights(model, [images])
    gplq.save(model, tmp_path / 'model.safetensors')
    loaded = gplq.load(toy_vit(), tmp_path / 'model.safetensors')
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))
        assert torch.equal(copy.deepcopy(model)(images), model(images))
    kinds = {row.site: row.granularity for row in gplq.summary(model).sites}
    assert kinds['attention_map'] == 'head + twin uniform'
    assert kinds['gelu_output'] == 'tensor + twin uniform'


def test_what_has_no_two_parts_is_refused(toy_vit: Make, images: Tensor, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match='attention_map must be one of'):
        gplq.Recipe.gplq(attention_map='log2')
    with pytest.raises(RecipeError, match='has no offset'):
        QuantizerSpec(4, offset=True, scheme='twin_uniform')
    model = prepared(toy_vit, images, 4, attention_map='twin_uniform')
    gplq.quantize_weights(model, [images])
    pytest.importorskip('onnx')
    with pytest.raises(TargetError, match='twin_uniform quantizers have no operator in ONNX'):
        gplq.export(model, tmp_path / 'model.onnx', images[:2])


class Mixing(nn.Module):
    """Attention that mixes its heads after the softmax, as CaiT does: maps become negative."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 2
        self.qkv, self.mix = nn.Linear(8, 24), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(len(x), -1, 3, 2, 4).permute(2, 0, 3, 1, 4)
        attention = self.mix((q @ k.transpose(-2, -1)).softmax(dim=-1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        y: Tensor = (attention @ v).transpose(1, 2).reshape(len(x), -1, 8)
        return y


def test_a_negative_map_has_no_logarithm() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 6, 8)
    model = Mixing().eval()
    gplq.prepare(model, gplq.Recipe.gplq(attention_map='log_sqrt2'), x)
    with pytest.raises(CalibrationError, match="attention_map has negative values.*attention_map='uniform'"):
        gplq.calibrate(model, [x])
    model = Mixing().eval()
    gplq.prepare(model, gplq.Recipe.gplq(8, 8, attention_map='twin_uniform'), x)
    expected = Mixing().eval()
    expected.load_state_dict({k: v for k, v in model.state_dict().items() if k in expected.state_dict()})
    gplq.calibrate(model, [x])
    with torch.no_grad():
        assert torch.allclose(model(x), expected(x), atol=0.1)
