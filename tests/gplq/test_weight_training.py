"""Quantization-aware training of weights and activations together: what it rounds, its gradients, how it ends."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import gplq
from gplq.activation_stage import parameter_groups
from gplq.bin_regularization import bin_regularization
from gplq.errors import RecipeError
from gplq.record import floating_point, scale_parameters, weight_views
from gplq.serialization import describe, restore
from gplq.weight_training import Oscillations, weight_regularization
from gplq.weights import WeightQuantizer

Make = Callable[..., nn.Module]


def calibrated(toy_vit: Make, images: Tensor, bits: int = 3, **settings) -> nn.Module:
    model = toy_vit()
    gplq.prepare(model, gplq.Recipe.lsq(bits, bits, **settings), images[:2])
    gplq.calibrate(model, [images])
    return model


def test_gradients_are_those_of_lsq() -> None:
    quantizer = WeightQuantizer(3, 1, asymmetric=False, folded=True, learned='lsq')
    assert quantizer.log_scale is not None
    with torch.no_grad():
        quantizer.log_scale.copy_(torch.tensor([0.5]).log())
    quantizer.learning = True
    # In steps of 0.5: inside, inside, above the largest code of 3, below the least of -4.
    weight = torch.tensor([[0.6, -0.9, 2.0, -3.0]], requires_grad=True)
    rounded = quantizer.rounded(weight, torch.ones(4))
    assert rounded.tolist() == [[0.5, -1.0, 1.5, -2.0]]
    rounded.sum().backward()
    assert weight.grad.tolist() == [[1.0, 1.0, 0.0, 0.0]]
    # s (code - w / s) inside, s * bound outside, times 1 / sqrt(columns * qmax) (Esser et al. 2020, eq. 3, sec. 2.2).
    slope = 0.5 * ((1 - 1.2) + (-2 + 1.8) + 3 - 4)
    assert float(quantizer.log_scale.grad) == pytest.approx(slope / (4 * 3) ** 0.5, rel=1e-2)


def test_the_module_dependent_factor_is_that_of_the_formula() -> None:
    """VVTQ: ``g = 1 / sqrt(qmax * ||w||_1)`` times LSQ's derivative, here by finite differences of its branches."""
    torch.manual_seed(0)
    weight, bits = torch.randn(2, 50, dtype=torch.float64), 3
    quantizer = WeightQuantizer(bits, 2, asymmetric=False, folded=True, learned='norm')
    with torch.no_grad():
        quantizer.log_scale.copy_(torch.tensor([0.4, 0.7]).log())
    quantizer.learning = True
    out = torch.randn(2, 50, dtype=torch.float64)
    (quantizer.rounded(weight.float(), torch.ones(50)) * out).sum().backward()
    for row, scale in enumerate((0.4, 0.7)):
        codes = (weight[row] / scale).round()
        inside = (weight[row] / scale >= -4) & (weight[row] / scale <= 3)

        def straight_through(log_s: float, row=row, scale=scale, codes=codes, inside=inside) -> float:  # noqa: ANN001
            # round(v) = v + c with c fixed where it is differentiated; bounds times the scale outside.
            s = torch.tensor(log_s, dtype=torch.float64).exp()
            v = weight[row] / s
            y = torch.where(inside, (v + (codes - weight[row] / scale)) * s, codes.clamp(-4, 3) * s)
            return float((y * out[row]).sum())

        center, h = torch.tensor(scale, dtype=torch.float64).log().item(), 1e-6
        slope = (straight_through(center + h) - straight_through(center - h)) / (2 * h)
        factor = (3 * weight[row].abs().sum()) ** -0.5
        # Rounding errors are kept in 8 bit.
        assert float(quantizer.log_scale.grad[row]) == pytest.approx(slope * float(factor), rel=0.02, abs=2e-3)


def test_steps_by_statistics_follow_the_weight(toy_vit: Make, images: Tensor) -> None:
    model = calibrated(toy_vit, images, trained_steps='statistics', linear_input='tensor')
    view = next(v for _, v in weight_views(model) if v.name == 'blocks.0.fc1')
    quantizer = view.map.weight
    assert not quantizer.log_scale.requires_grad
    expected = 2 * view.matrix().abs().mean(dim=1) / 4
    torch.testing.assert_close(quantizer.log_scale.exp(), expected)
    labels = torch.arange(len(images)) % 5
    gplq.train_activations(model, [(images, labels)] * 3, stage=gplq.ActivationStage(lr=1e-2))
    model(images)
    torch.testing.assert_close(quantizer.log_scale.exp(), 2 * view.matrix().abs().mean(dim=1) / 4)
    with torch.no_grad():
        trained = model.eval()(images)
    gplq.quantize_weights(model, [images])
    with torch.no_grad():
        torch.testing.assert_close(model(images), trained, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('linear_input', ['tensor', 'channel'])
def test_the_weight_stage_keeps_what_was_trained(linear_input: str, toy_vit: Make, images: Tensor) -> None:
    # An offset has a gradient only where a value is clipped, and one in all channels of a layer may have none.
    settings = dict(linear_input=linear_input, input_offset=linear_input == 'channel', fold_layernorm=False)
    model = calibrated(toy_vit, images, **settings)
    labels = torch.arange(len(images)) % 5
    before = {id(p): p.detach().clone() for p in scale_parameters(model)}
    stage = gplq.ActivationStage(lr=1e-3, scale_lr=1e-2)
    gplq.train_activations(model, [(images, labels)] * 3, stage=stage)
    assert all(not torch.equal(p, before[id(p)]) for p in scale_parameters(model))
    with torch.no_grad():
        trained = model.eval()(images)
    gplq.quantize_weights(model, [images])
    with torch.no_grad():
        assert torch.allclose(model(images), trained, atol=1e-4)
    assert not [name for name in model.state_dict() if name.endswith('weight.log_scale')]
    for _, view in weight_views(model):
        assert view.map.weight is not None and not view.map.weight.learning
        codes = view.codes()
        assert float(codes.min()) >= -(2 ** (view.map.weight.spec.bits - 1))


def test_training_lowers_the_loss_of_the_quantized_model(toy_vit: Make, images: Tensor) -> None:
    labels = torch.arange(len(images)) % 5
    model = calibrated(toy_vit, images, bits=2)

    def loss() -> float:
        with torch.no_grad():
            return float(nn.functional.cross_entropy(model(images), labels))

    model.eval()
    start = loss()
    gplq.train_activations(model, [(images, labels)], iterations=40, stage=gplq.ActivationStage(lr=3e-3, scale_lr=1e-2))
    model.eval()
    trained = loss()
    gplq.quantize_weights(model, [images])
    assert trained < 0.7 * start
    assert loss() == pytest.approx(trained, rel=1e-3)


def test_regularization_adds_up_over_weights_and_draws_them_to_their_bins(toy_vit: Make, images: Tensor) -> None:
    model = calibrated(toy_vit, images, bits=3)
    expected = 0.0
    for _, view in weight_views(model):
        quantizer = view.map.weight
        scale = view.map.column_scale
        # Without the geometric mean of the input's scales, as the weight is rounded.
        folded = view.matrix() * (scale / scale.log().mean().exp())
        expected += float(
            bin_regularization(folded, quantizer.log_scale.exp(), quantizer.spec.qmin, quantizer.spec.qmax)
        )
    assert float(weight_regularization(model, 1.0, 0.5)) == pytest.approx(0.5 * expected, rel=1e-5)
    assert float(weight_regularization(model, 0.2, 0.5)) == 0
    labels = torch.arange(len(images)) % 5
    distances = []
    for strength in (0.0, 10.0):
        model = calibrated(toy_vit, images, bits=3)
        stage = gplq.ActivationStage(lr=1e-3, scale_lr=0.0, regularization=strength, regularization_start=0.0)
        gplq.train_activations(model, [(images, labels)], iterations=30, stage=stage)
        distances.append(float(weight_regularization(model, 1.0, 1.0)))
    assert distances[1] < 0.7 * distances[0]
    with pytest.raises(RecipeError, match='pass iterations'):
        gplq.train_activations(model, (pair for pair in [(images, labels)]), stage=stage)
    for settings in (dict(regularization=-1.0), dict(regularization_start=2.0)):
        with pytest.raises(RecipeError, match='regularization'):
            gplq.ActivationStage(**settings)


def test_oscillations_are_counted_over_all_weights(toy_vit: Make, images: Tensor) -> None:
    model = calibrated(toy_vit, images, bits=2)
    oscillations = Oscillations(momentum=0.5)
    assert oscillations.share() == 0
    view = next(v for _, v in weight_views(model) if v.name == 'blocks.0.fc1')
    weight = view.owner.weight
    for sign in (1, -1, 1, -1):
        with torch.no_grad():
            weight[0] = sign * weight[0].abs().clamp(min=1.0)
        oscillations.update(model)
    count = sum(v.matrix().numel() for _, v in weight_views(model))
    assert oscillations.share() == pytest.approx(weight.shape[1] / count)


def test_annealing_holds_weights_in_the_middle_of_their_bins(toy_vit: Make, images: Tensor) -> None:
    model = calibrated(toy_vit, images, bits=3, linear_input='tensor')
    view = next(v for _, v in weight_views(model) if v.name == 'blocks.0.fc1')
    steps = view.map.weight.log_scale.exp()
    positions = torch.tensor([0.0, 0.2, 0.498, 0.503, 0.52, 3.2, 3.4999, 9.0])
    with torch.no_grad():
        view.owner.weight[:, : len(positions)] = positions * steps[:, None]
    before = view.matrix().clone()
    labels = torch.arange(len(images)) % 5
    # Momentum too: the first half of the stage holds nothing.
    stage = gplq.ActivationStage(lr=1e-5, scale_lr=0.0, annealing=1.0)
    gplq.train_activations(model, [(images, labels)], iterations=1, stage=stage)
    moved = view.matrix()[:, : len(positions)] != before[:, : len(positions)]
    assert moved.any(dim=0).tolist() == [False, False, True, True, False, False, False, False]

    model = calibrated(toy_vit, images, bits=3)
    counts = []
    for annealing in (0.0, 0.5):
        model = calibrated(toy_vit, images, bits=3)
        weight = next(v for _, v in weight_views(model) if v.name == 'blocks.0.fc1').owner.weight
        stage = gplq.ActivationStage(lr=1e-3, scale_lr=0.0, annealing=annealing)
        seen: list[Tensor] = []

        def loss(m: nn.Module, batch, seen=seen, weight=weight) -> Tensor:  # noqa: ANN001
            seen.append(weight.detach().clone())
            return nn.functional.cross_entropy(m(batch[0]), batch[1])

        gplq.train_activations(model, [(images, labels)], iterations=6, stage=stage, loss=loss)
        counts.append([int((a != b).sum()) for a, b in zip(seen, seen[1:], strict=False)])
    assert min(counts[0]) > 0.9 * weight.numel()
    assert min(counts[1][:3]) > 0.9 * weight.numel()
    assert max(counts[1][3:]) < 0.1 * weight.numel()


def test_floating_point_means_weights_too(toy_vit: Make, images: Tensor) -> None:
    model = calibrated(toy_vit, images)
    with torch.no_grad(), floating_point(model):
        assert torch.allclose(model(images), toy_vit()(images), atol=1e-5)
    with torch.no_grad():
        assert not torch.allclose(model(images), toy_vit()(images), atol=1e-2)


def test_weights_and_scales_have_rates_of_their_own(toy_vit: Make, images: Tensor) -> None:
    model = calibrated(toy_vit, images)
    weights, scales = parameter_groups(model, gplq.ActivationStage(), 1000)
    assert {id(p) for p in scales['params']} == {id(p) for p in scale_parameters(model)}
    assert not {id(p) for p in weights['params']} & {id(p) for p in scales['params']}
    learned = [view.map.weight for _, view in weight_views(model)]
    assert all(any(q.log_scale is p for p in scales['params']) for q in learned)


def test_a_copy_a_checkpoint_and_a_file_compute_the_same(toy_vit: Make, images: Tensor, tmp_path: Path) -> None:
    model = calibrated(toy_vit, images).eval()
    with torch.no_grad():
        expected = model(images)
        assert torch.equal(copy.deepcopy(model)(images), expected)
    # As a resumed run is rebuilt, in the middle of its training.
    other = toy_vit()
    restore(other, describe(model))
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(other.eval()(images), expected)
    gplq.quantize_weights(model, [images])
    gplq.save(model, tmp_path / 'model.safetensors')
    with torch.no_grad():
        assert torch.equal(gplq.load(toy_vit(), tmp_path / 'model.safetensors')(images), model(images))


@pytest.mark.parametrize('settings', [dict(compensation='qwt'), dict(weight_scheme='percentile_asymmetric')])
def test_what_would_undo_the_training_is_refused(settings: dict) -> None:
    with pytest.raises(RecipeError, match="trained_steps='norm' is for train_weights=True"):
        gplq.Recipe.gplq(4, 4, trained_steps='norm')
    with pytest.raises(RecipeError, match="learns the weights' rounding already: set rounding='nearest'"):
        gplq.Recipe.lsq(4, 4, rounding='reconstruct')
    with pytest.raises(RecipeError, match='train_weights=True settles the weights'):
        gplq.Recipe.lsq(4, 4, **settings)
