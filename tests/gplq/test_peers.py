"""The methods that only calibrate: each one's quantizers, its integers, and what it adds to those before it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import gplq
from gplq import integer
from gplq.layers import QuantizedLinear
from gplq.record import floating_point, named_products, weight_views

Make = Callable[..., nn.Module]
METHODS = {
    'rtn': gplq.Recipe.rtn,
    'ptq4vit': gplq.Recipe.ptq4vit,
    'repq_vit': gplq.Recipe.repq_vit,
    'gptq': gplq.Recipe.gptq,
    'qwt': gplq.Recipe.qwt,
    'erq': gplq.Recipe.erq,
    'reconstruct': gplq.Recipe.reconstruct,
}


def quantized(method: str, bits: int, toy_vit: Make, images: Tensor, **settings) -> nn.Module:
    model = toy_vit()
    quick = gplq.Reconstruction(iterations=60)
    gplq.prepare(model, METHODS[method](bits, bits, **settings), images[:2])
    gplq.calibrate(model, [images])
    if method == 'ptq4vit':
        gplq.search_scales(model, [images], search=gplq.ScaleSearch(candidates=30, rounds=1, images=len(images)))
    gplq.quantize_weights(model, list(images.chunk(4)), reconstruction=quick)
    return model


def error(model: nn.Module, toy_vit: Make, images: Tensor) -> float:
    with torch.no_grad():
        expected = toy_vit()(images)
        return float((model(images) - expected).norm() / expected.norm())


@pytest.mark.parametrize('method', METHODS)
def test_eight_bits_are_right_and_on_integers(method: str, toy_vit: Make, images: Tensor) -> None:
    # Powers of the root of two are coarse at any width: the map stays uniform here, and has a test of its own below.
    log = {'attention_map': 'uniform'} if method in ('repq_vit', 'qwt', 'erq') else {}
    model = quantized(method, 8, toy_vit, images, **log)
    assert error(model, toy_vit, images) < 0.03
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            module.register_forward_hook(lambda m, args, y, name=name: seen.__setitem__(name, (args[0], y)))
    with torch.no_grad():
        model(images)
    for _, view in weight_views(model):
        if isinstance(view.owner, QuantizedLinear):
            x, y = seen[view.name]
            assert torch.allclose(integer.linear_from_codes(view, x), y, atol=1e-4), view.name


def test_repq_vit_has_offsets_and_a_scale_a_channel_behind_norms(toy_vit: Make, images: Tensor) -> None:
    model = quantized('repq_vit', 4, toy_vit, images)
    plans = {plan.name: plan.input.spec for plan, _ in weight_views(model)}
    for name, granularity in (('attn.qkv', 'channel'), ('attn.proj', 'tensor'), ('fc1', 'channel'), ('fc2', 'tensor')):
        spec = plans[f'blocks.0.{name}']
        assert (spec.granularity, spec.offset, spec.signed) == (granularity, True, False)
    assert not plans['patch_embed'].offset
    schemes = {p.operands[0].spec.scheme for name, p in named_products(model) if name.endswith(':1')}
    assert schemes == {'log_sqrt2'}
    assert error(model, toy_vit, images) < 0.5


def test_repq_vit_clips_channels_one_by_one(toy_vit: Make, images: Tensor) -> None:
    """The released code's three percentiles, which GPLQ's search over whole ranges does not have."""
    scales = {}
    for ranges in ('min_max', 'percentiles'):
        model = quantized('repq_vit', 4, toy_vit, images, channel_ranges=ranges, fold_layernorm=False)
        quantizer = model.get_submodule('blocks.0.fc1').quantization.input
        scales[ranges] = quantizer.scale
    shares = scales['percentiles'] / scales['min_max']
    assert float(shares.max()) <= 1 + 1e-6
    assert len(shares.unique()) > 1


def test_repq_vits_reparametrization_leaves_the_function_as_it_was(toy_vit: Make, images: Tensor) -> None:
    """Scales a channel divide LayerNorms and multiply the weights behind them: without rounding nothing changes."""
    outputs = []
    for folded in (False, True):
        model = quantized('repq_vit', 8, toy_vit, images, fold_layernorm=folded, attention_map='uniform')
        norm = model.get_submodule('blocks.0.norm1').weight.detach()
        assert torch.equal(norm, toy_vit().get_submodule('blocks.0.norm1').weight) != folded
        with torch.no_grad(), floating_point(model):
            outputs.append(model(images))
    assert torch.allclose(*outputs, atol=1e-5)
    with torch.no_grad():
        expected = toy_vit()(images)
    # The weights' rounding alone is left.
    assert float((outputs[0] - expected).norm() / expected.norm()) < 0.02


def test_what_is_fitted_or_fed_back_is_nearer_to_the_floating_point_model(toy_vit: Make, images: Tensor) -> None:
    found = {method: error(quantized(method, 3, toy_vit, images), toy_vit, images) for method in METHODS}
    assert found['gptq'] < found['rtn']
    assert found['qwt'] < found['repq_vit']
    assert found['erq'] < found['repq_vit']
    assert found['reconstruct'] < found['rtn']
