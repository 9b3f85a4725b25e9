"""Compensation compares a model with itself before rounding: on the same samples, where there are any."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import gplq
from gplq.record import record_of

Make = Callable[..., nn.Module]


class Sampler(nn.Module):
    """Draws some of its rows, as a detector does of its proposals, and may skip the layers behind that."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model, self.fc1, self.fc2 = model, nn.Linear(5, 24), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.model(x)
        if float(x.sum()) == 0:
            return x.new_zeros(0, 3)
        rows = torch.randint(len(x), (len(x),))
        y: Tensor = self.fc2(torch.nn.functional.gelu(self.fc1(x[rows])))
        return y


class Head(nn.Module):
    """Blank images give nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :5] * 1.0


def error(model: nn.Module, reference: nn.Module, x: Tensor) -> float:
    outputs = []
    for m in (model, reference):
        torch.manual_seed(5)
        with torch.no_grad():
            outputs.append(m(x))
    return float((outputs[0] - outputs[1]).norm() / outputs[1].norm())


def quantized(kind: str, batches: list[Tensor]) -> nn.Module:
    model = Sampler(Head()).eval()
    recipe = gplq.Recipe.gplq(3, 8, rounding='nearest', compensation=kind, first_last_bits=3)
    gplq.prepare(model, recipe, max(batches, key=lambda batch: float(batch.abs().sum())))
    gplq.calibrate(model, batches)
    gplq.quantize_weights(model, batches)
    return model


@pytest.mark.parametrize('kind', ['erq', 'affine'])
def test_what_a_forward_pass_draws_is_drawn_alike(kind: str) -> None:
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(2))
    plain = error(quantized('none', [x]), Sampler(Head()).eval(), x)
    # Of different samples, the fit would make it several times worse.
    assert error(quantized(kind, [x]), Sampler(Head()).eval(), x) < 1.1 * plain


def test_the_random_state_is_left_alone(toy_vit: Make, images: Tensor) -> None:
    model = toy_vit()
    gplq.prepare(model, gplq.Recipe.gplq(4, 4, compensation='ridge'), images[:2])
    gplq.calibrate(model, [images])
    state = torch.random.get_rng_state()
    gplq.quantize_weights(model, [images])
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize('kind', ['erq', 'affine'])
def test_batches_that_do_not_reach_a_layer_are_passed_over(kind: str) -> None:
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(2))
    found = quantized(kind, [torch.zeros(4, 8), x, torch.zeros(4, 8)])
    alone = quantized(kind, [torch.zeros(4, 8), x])
    assert error(found, alone, x) == 0


@pytest.mark.parametrize('kind', ['qwt', 'ridge', 'affine'])
def test_a_batch_with_labels_is_held_out_from_as_one_without(kind: str, toy_vit: Make, images: Tensor) -> None:
    states = []
    for batch in (images, (images, torch.zeros(len(images))), {'x': images}):
        model = toy_vit()
        gplq.prepare(model, gplq.Recipe.gplq(3, 4, rounding='nearest', compensation=kind), images[:2])
        gplq.calibrate(model, [batch])
        gplq.quantize_weights(model, [batch])
        states.append(model.state_dict())
    for other in states[1:]:
        assert other.keys() == states[0].keys()
        assert all(torch.equal(tensor, other[name]) for name, tensor in states[0].items())


@pytest.mark.parametrize('kind', ['qwt', 'ridge', 'affine'])
def test_nothing_is_fitted_to_the_sample_that_would_judge_it(
    kind: str, toy_vit: Make, images: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    states = []
    for compensation in ('none', kind):
        model = toy_vit()
        gplq.prepare(model, gplq.Recipe.gplq(3, 4, rounding='nearest', compensation=compensation), images[:2])
        gplq.calibrate(model, [images[:1]])
        gplq.quantize_weights(model, [images[:1]])
        states.append(model.state_dict())
    assert 'a single sample cannot be fitted and judged by' in caplog.text
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def many() -> Tensor:
    return torch.randn(128, 3, 16, 16, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize('method', ['qwt', 'erq'])
def test_what_rounding_the_inputs_took_away_is_given_back_too(method: str, toy_vit: Make) -> None:
    """With weights of eight bits nearly all of the error is that of activations of three."""
    images, errors = many(), []
    for recipe in (gplq.Recipe.repq_vit(8, 3), getattr(gplq.Recipe, method)(8, 3)):
        model = toy_vit()
        gplq.prepare(model, recipe, images[:2])
        gplq.calibrate(model, [images])
        gplq.quantize_weights(model, list(images.chunk(4)))
        errors.append(error(model, toy_vit(), images))
    assert errors[1] < 0.95 * errors[0]


def test_activations_that_were_trained_are_what_is_fitted_to(toy_vit: Make) -> None:
    images, errors = many(), []
    for trained in (True, False):
        model = toy_vit()
        gplq.prepare(model, gplq.Recipe.erq(8, 3), images[:2])
        gplq.calibrate(model, [images])
        gplq.train_activations(model, [(images, torch.arange(128) % 5)], iterations=1)
        assert record_of(model).trained
        record_of(model).trained = trained
        between = copy.deepcopy(model)
        gplq.quantize_weights(model, list(images.chunk(4)))
        errors.append(error(model, between, images))
    assert errors[0] < 0.8 * errors[1]


def test_a_refitted_weight_is_the_ridge_of_its_quantized_inputs() -> None:
    """With weights of eight bits rounding is next to nothing: what is left is what least squares leave."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4), nn.Linear(4, 3)).eval()
    x = torch.randn(1000, 6) @ torch.randn(6, 6)
    layer = model[1]
    with torch.no_grad():
        target = layer(model[0](x))
    original = layer.weight.detach().clone()
    gplq.prepare(model, gplq.Recipe.rtn(8, 3, compensation='erq', first_last_bits=32), x[:2])
    gplq.calibrate(model, [x])
    with torch.no_grad():
        inputs = layer.quantization.input(model[0](x))
        before = float((inputs @ original.t() + layer.bias - target).square().mean())
        design = torch.cat([inputs, torch.ones(len(x), 1)], dim=1)
        least = float((design @ torch.linalg.lstsq(design, target).solution - target).square().mean())
    gplq.quantize_weights(model, [x])
    with torch.no_grad():
        after = float((layer(model[0](x)) - target).square().mean())
    assert least < 0.97 * before
    # A quarter of the samples is held out, which the optimum of all knows.
    assert after - least < 0.2 * (before - least)
