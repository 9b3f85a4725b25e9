from __future__ import annotations

import pytest
import torch

from gplq.errors import TargetError
from gplq.feature_distance import feature_distance


def test_by_hand_and_whatever_the_size_of_a_map() -> None:
    teacher = [torch.tensor([3.0, 4.0]), torch.full((2, 2), 100.0)]
    student = [torch.tensor([3.0, 5.0]), torch.full((2, 2), 90.0)]
    assert feature_distance(student, teacher).item() == pytest.approx((1 / 25 + 0.01) / 2)
    assert feature_distance([m * 1000 for m in student], [m * 1000 for m in teacher]).item() == pytest.approx(0.025)
    assert feature_distance(teacher, teacher).item() == 0
    assert feature_distance([torch.zeros(2)], [torch.tensor([1.0, -5.0])]).item() == 1


def test_only_the_student_learns() -> None:
    student, teacher = torch.ones(3, requires_grad=True), torch.full((3,), 2.0, requires_grad=True)
    feature_distance([student], [teacher]).backward()
    assert teacher.grad is None
    # d/ds mean((s - t)^2) / mean(t^2) = 2 (s - t) / (3 * 4)
    torch.testing.assert_close(student.grad, torch.full((3,), -1 / 6))


def test_a_teacher_of_zeros_gives_a_finite_distance() -> None:
    assert feature_distance([torch.zeros(3)], [torch.zeros(3)]).item() == 0


@pytest.mark.parametrize('teacher', [[torch.ones(2)], [torch.ones(3), torch.ones(3)], []])
def test_maps_must_be_alike(teacher: list[torch.Tensor]) -> None:
    with pytest.raises(TargetError, match=r'the student gives maps of \[\(3,\)\], the teacher of'):
        feature_distance([torch.ones(3)], teacher)
    with pytest.raises(TargetError):
        feature_distance([], [])
