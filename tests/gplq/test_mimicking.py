"""The feature loss against its formula, and the first stage that trains on it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gplq
from gplq.activation_stage import feature_point, parameter_groups, stage_iterations
from gplq.errors import GPLQError, RecipeError, StageError, TrainingError
from gplq.pca import PCABasis, fit_pca
from gplq.record import named_quantizers


def basis(rank: int = 2, width: int = 4) -> PCABasis:
    q, _ = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(0)))
    return PCABasis(torch.arange(float(width)), q[:, :rank].contiguous(), 0.6, 5.0)


@pytest.mark.parametrize(('reduction', 'share'), [('sum', 1.0), ('mean', 1 / 2), ('relative', 1 / 5)])
def test_formula(reduction: Any, share: float) -> None:
    student, teacher, chosen = torch.randn(7, 4), torch.randn(7, 4), basis()
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        # As printed in eq. 2, with the mean that cancels.
        difference = (s - chosen.mean) @ chosen.components - (t - chosen.mean) @ chosen.components
        total += float(difference.square().sum())
    found = gplq.MimickingLoss(chosen, reduction)(student, teacher)
    assert float(found) == pytest.approx(share * total / 7, rel=1e-5)


def test_mean_over_maps() -> None:
    loss = gplq.MimickingLoss([basis(), basis()])
    one = [torch.randn(2, 4, 3, 3), torch.randn(2, 4, 2, 2)]
    other = [torch.randn(2, 4, 3, 3), torch.randn(2, 4, 2, 2)]
    single = gplq.MimickingLoss(basis())
    expected = (single(one[0], other[0]) + single(one[1], other[1])) / 2
    assert float(loss(one, other)) == pytest.approx(float(expected))


def test_directions_outside_the_basis_cost_nothing() -> None:
    chosen = basis(rank=2)
    full, _ = torch.linalg.qr(torch.cat([chosen.components, torch.randn(4, 2)], dim=1))
    teacher = torch.randn(5, 4)
    loss = gplq.MimickingLoss(chosen)
    assert float(loss(teacher + full[:, 3], teacher)) == pytest.approx(0, abs=1e-9)
    assert float(loss(teacher + full[:, 0], teacher)) == pytest.approx(1, rel=1e-5)


def test_only_the_student_is_pulled() -> None:
    student, teacher = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    gplq.MimickingLoss(fit_pca([torch.randn(20, 4)], rank=2))(student, teacher).backward()
    assert student.grad is not None and teacher.grad is None


def test_unknown_reduction() -> None:
    with pytest.raises(RecipeError, match='max'):
        gplq.MimickingLoss(basis(), 'max')  # type: ignore[arg-type]


@pytest.fixture
def calibrated(toy_vit: Callable[..., nn.Module], images: Tensor) -> tuple[nn.Module, nn.Module]:
    """A calibrated student and its FP32 teacher."""
    teacher = toy_vit(depth=1)
    model = copy.deepcopy(teacher)
    gplq.prepare(model, 'w4a4', images[:2])
    gplq.calibrate(model, [images])
    return model, teacher


FAST = gplq.ActivationStage(lr=1e-4, scale_lr=1e-2, rank=4)


def labelled(images: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [(part, torch.arange(len(part)) % 5) for part in images.chunk(4)]


def test_weights_and_scales_move_and_the_teacher_does_not(
    calibrated: tuple[nn.Module, nn.Module], images: Tensor
) -> None:
    model, teacher = calibrated
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    frozen = {name: p.detach().clone() for name, p in teacher.named_parameters()}
    mode = model.training
    gplq.train_activations(model, labelled(images), teacher=teacher, stage=FAST)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert {name for name in before if name.endswith('log_scale')} <= moved
    assert {'patch_embed.weight', 'blocks.0.attn.qkv.weight', 'head.weight'} <= moved
    assert all(torch.equal(p, frozen[name]) for name, p in teacher.named_parameters())
    assert not any(p.requires_grad for p in teacher.parameters())
    assert model.training == mode


def test_it_learns(calibrated: tuple[nn.Module, nn.Module], images: Tensor) -> None:
    model, teacher = calibrated

    def distance() -> float:
        with torch.no_grad():
            return float((model.eval()(images) - teacher(images)).square().mean())

    before = distance()
    stage = gplq.ActivationStage(lr=3e-4, scale_lr=3e-3, rank=16)
    gplq.train_activations(model, [images], teacher=teacher, stage=stage, iterations=25, loss=None)
    assert distance() < 0.9 * before


def test_without_labels_labels_are_not_read(calibrated: tuple[nn.Module, nn.Module], images: Tensor) -> None:
    model, teacher = calibrated
    gplq.train_activations(model, [images], teacher=teacher, stage=FAST, loss=None)
    with pytest.raises(RecipeError, match='teacher'):
        gplq.train_activations(model, [images], loss=None)


def test_nan_stops_with_the_weights_of_the_step_before(calibrated: tuple[nn.Module, nn.Module], images: Tensor) -> None:
    model, _ = calibrated
    seen: list[dict[str, Tensor]] = []

    def loss(m: nn.Module, batch: Tensor) -> Tensor:
        seen.append({name: p.detach().clone() for name, p in m.named_parameters()})
        value: Tensor = m(batch).square().mean()
        return value if len(seen) < 3 else value * float('nan')

    with pytest.raises(TrainingError, match='iteration 2'):
        gplq.train_activations(model, [images] * 5, stage=FAST, loss=loss)
    assert all(torch.equal(p, seen[2][name]) for name, p in model.named_parameters())


def test_empty_loader(calibrated: tuple[nn.Module, nn.Module], images: Tensor) -> None:
    model, teacher = calibrated
    with pytest.raises(GPLQError, match='empty'):
        gplq.train_activations(model, [], teacher=teacher, stage=FAST)
    with pytest.raises(GPLQError, match='empty'):
        gplq.train_activations(model, [], stage=FAST, iterations=3)


def test_stage_one_needs_calibration(toy_vit: Callable[..., nn.Module], images: Tensor) -> None:
    with pytest.raises(StageError, match='not prepared'):
        gplq.train_activations(toy_vit(), labelled(images))
    model = toy_vit()
    gplq.prepare(model, 'w4a4', images[:2])
    with pytest.raises(StageError, match='calibrated'):
        gplq.train_activations(model, labelled(images))


def test_groups_and_feature_point(calibrated: tuple[nn.Module, nn.Module]) -> None:
    model, _ = calibrated
    weights, scales = parameter_groups(model, gplq.ActivationStage(lr=1.0, scale_lr=2.0, weight_decay=0.5))
    assert (weights['lr'], weights['weight_decay']) == (1.0, 0.5)
    assert (scales['lr'], scales['weight_decay']) == (2.0, 0.0)
    assert len(scales['params']) == sum(1 for _ in named_quantizers(model))
    assert len(weights['params']) + len(scales['params']) == len(list(model.parameters()))
    assert feature_point(model) == ('head', 'input')


@pytest.mark.parametrize(
    ('epoch', 'full', 'expected'), [(5000, 0, 5000), (100, 0, 1000), (100, 2400, 240), (100, 50_000, 1000), (9, 3, 1)]
)
def test_length(epoch: int, full: int, expected: int) -> None:
    assert stage_iterations(epoch, full) == expected


@pytest.mark.parametrize('wrong', [{'lr': -1.0}, {'scale_lr': float('nan')}, {'pca_samples': 0}])
def test_settings_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=next(iter(wrong))):
        gplq.ActivationStage(**wrong)
