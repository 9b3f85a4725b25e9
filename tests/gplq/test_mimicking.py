"""The feature loss against its formula, and the teacher behind it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gplq
from gplq.errors import RecipeError
from gplq.mimicking import FeatureTap, Mimicking, fit_mimicking_loss
from gplq.pca import PCABasis, fit_pca


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


def test_rank_is_a_multiple_that_can_be_chosen() -> None:
    """Of variances 4, 2, 1 and 1, two directions explain 70 %."""
    batch = torch.randn(4096, 4) * torch.tensor([4.0, 2.0, 1.0, 1.0]).sqrt()
    teacher = nn.Identity()
    ranks = {
        multiple: fit_mimicking_loss(
            teacher,
            FeatureTap(teacher, '', 'output'),
            [batch],
            nn.Module.__call__,
            explained_variance=0.7,
            multiple=multiple,
        )
        .bases[0]
        .rank
        for multiple in (1, 4)
    }
    assert ranks == {1: 2, 4: 4}


def test_unknown_reduction() -> None:
    with pytest.raises(RecipeError, match='max'):
        gplq.MimickingLoss(basis(), 'max')  # type: ignore[arg-type]


class Teacher(nn.Linear):
    """Notes whether it builds a graph."""

    def forward(self, input: Tensor) -> Tensor:
        self.grad_enabled = torch.is_grad_enabled()
        return super().forward(input)


def test_the_teacher_runs_frozen_and_without_a_graph() -> None:
    """On inputs that are trained themselves a graph through the teacher would double the memory of a step."""
    student, teacher = nn.Linear(4, 4), Teacher(4, 4).train()
    mimicking = Mimicking(student, teacher, gplq.MimickingLoss(basis()), weight=3.0)
    x = torch.randn(5, 4, requires_grad=True)
    with mimicking.attached():
        y = student(x)
        found = mimicking()
    assert not teacher.grad_enabled and not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())
    with torch.no_grad():
        expected = 3 * gplq.MimickingLoss(basis())(y, nn.functional.linear(x, teacher.weight, teacher.bias))
    assert float(found.detach()) == pytest.approx(float(expected))


class Noted(nn.Linear):
    """Notes in what order modules run."""

    def __init__(self, name: str, order: list[str]) -> None:
        super().__init__(4, 4)
        self.name, self.order = name, order

    def forward(self, x: Tensor) -> Tensor:
        self.order.append(self.name)
        return super().forward(x)


def test_the_teacher_runs_before_the_student_in_training_alone() -> None:
    """What it needs meanwhile would add to the peak behind the student, whose activations are kept."""
    order: list[str] = []
    student, teacher = Noted('student', order), Noted('teacher', order)
    mimicking = Mimicking(student, teacher, gplq.MimickingLoss(basis()))
    x = torch.randn(5, 4)
    with mimicking.attached():
        for run in range(2):
            student(x)
            mimicking()
            assert order == ['teacher', 'student'] * (run + 1)
        order.clear()
        student.eval()(x)
        with torch.no_grad():
            student.train()(x)
        assert order == ['student', 'student']
        # A student in inference mode may be trained: the loss then asks its teacher.
        student.eval()(x)
        assert mimicking().requires_grad
        assert order == ['student', 'student', 'student', 'teacher']
    student(x)
    assert order[-1] == 'student'
