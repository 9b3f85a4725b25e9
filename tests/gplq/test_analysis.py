"""Reports of sites against plain arithmetic, and modules quantized one at a time."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import gplq
from gplq.analysis import analyze, isolated
from gplq.errors import CalibrationError, StageError
from gplq.record import named_quantizers, weight_views

Make = Callable[..., nn.Module]


def calibrated(toy_vit: Make, images: Tensor, recipe: str = 'w4a4', **settings) -> nn.Module:
    model = toy_vit(**settings)
    gplq.prepare(model, recipe, images[:2])
    gplq.calibrate(model, [images])
    return model


@pytest.mark.parametrize('fused', [False, True])
def test_every_site_and_weight_has_a_report(fused: bool, toy_vit: Make, images: Tensor) -> None:
    model = calibrated(toy_vit, images, fused=fused)
    before = model(images)
    reports = analyze(model, [images[:8], images[8:]])
    names = [report.name for report in reports if report.kind != 'weight']
    assert names == [name for name, _ in named_quantizers(model)]
    assert [r.name for r in reports if r.kind == 'weight'] == [view.name for _, view in weight_views(model)]
    for report in reports:
        count = sum(report.histogram)
        assert count > 0 and report.low < report.high
        assert report.sqnr is not None and report.sqnr > 5, report.name
        assert len(report.grid) in (0, 16)
        assert len(report.heads) == (2 if report.name.endswith((':query', ':key', ':attention_map')) else 0)
    assert torch.equal(model(images), before)
    assert not any(q._forward_hooks for _, q in named_quantizers(model))


def test_the_first_sites_figures_by_plain_arithmetic(toy_vit: Make, images: Tensor) -> None:
    model = calibrated(toy_vit, images)
    name, quantizer = next(iter(named_quantizers(model)))
    report = analyze(model, [images])[0]
    assert name.startswith('patch_embed')
    with torch.no_grad():
        noise = (images - quantizer(images)).double().square().sum()
    assert report.sqnr == pytest.approx(10 * math.log10(images.double().square().sum() / noise), rel=1e-6)
    assert (report.low, report.high) == (float(images.min()), float(images.max()))
    assert sum(report.histogram) == images.numel()
    assert report.distribution.mean_size == pytest.approx(float(images.abs().mean()), rel=1e-5)


def test_more_bits_have_less_noise_and_rounded_weights_no_reference(
    toy_vit: Make, images: Tensor, quantized: Callable[..., nn.Module]
) -> None:
    few, many = (analyze(calibrated(toy_vit, images, recipe), [images]) for recipe in ('w3a3', 'w6a6'))
    for one, other in zip(few, many, strict=True):
        if one.bits == 3:
            assert one.sqnr < other.sqnr, one.name
    reports = analyze(quantized(), [images])
    assert all((report.sqnr is None) == (report.kind == 'weight') for report in reports)


def test_modules_are_quantized_alone_or_left_out_alone(toy_vit: Make, images: Tensor) -> None:
    model, exact = calibrated(toy_vit, images, 'w3a3'), toy_vit()
    whole = copy.deepcopy(model)
    gplq.quantize_weights(whole, [images])
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        x = model.patch_embed(images)
        with isolated(model, ['blocks.1']):
            tokens = model.patch_embed(images).flatten(2).transpose(1, 2)
            assert torch.equal(tokens, exact.patch_embed(images).flatten(2).transpose(1, 2))
            first = model.blocks[0](tokens)
            assert torch.allclose(first, exact.blocks[0](tokens), atol=1e-5)
            assert not torch.allclose(model.blocks[1](first), exact.blocks[1](first), atol=1e-2)
            alone = model(images)
        with isolated(model, ['blocks.1'], inverted=True):
            assert torch.allclose(model.blocks[1](first), exact.blocks[1](first), atol=1e-4)
            assert not torch.allclose(model.blocks[0](tokens), exact.blocks[0](tokens), atol=1e-2)
        with isolated(model, []):
            assert torch.allclose(model(images), exact(images), atol=1e-4)
        assert not torch.allclose(alone, exact(images), atol=1e-3)
        assert torch.equal(model.patch_embed(images), x)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(StageError), isolated(whole, ['blocks.1']):
        pass


def test_what_cannot_be_analyzed(toy_vit: Make, images: Tensor) -> None:
    model = toy_vit()
    gplq.prepare(model, 'w4a4', images[:2])
    with pytest.raises(StageError, match='is prepared, this needs a model that is calibrated or quantized'):
        analyze(model, [images])
    with pytest.raises(CalibrationError, match='there is no calibration batch'):
        analyze(calibrated(toy_vit, images), [])
