"""Codes that go back and forth, by hand."""

from __future__ import annotations

import pytest
import torch

from gplq.oscillation import OscillationCount


def test_a_change_of_direction_counts_and_a_walk_does_not() -> None:
    count = OscillationCount(momentum=0.5)
    #            still  walks  oscillates  turns after a pause
    for codes in ([0, 0, 0, 0], [0, 1, 1, 1], [0, 2, 0, 1], [0, 3, 1, 0]):
        count.update(torch.tensor(codes))
    # Steps at which each oscillated: the third at 2 and 3, the fourth at 3.
    assert count.frequency is not None
    assert count.frequency.tolist() == [0.0, 0.0, 0.5 * 0.5 + 0.5, 0.5]


def test_before_any_step_nothing_oscillates() -> None:
    count = OscillationCount()
    assert count.frequency is None
    count.update(torch.zeros(3, 4))
    assert count.frequency is not None and not count.frequency.any()


@pytest.mark.parametrize('period', [2, 5])
def test_the_frequency_of_a_steady_oscillation_is_found(period: int) -> None:
    count = OscillationCount()
    for step in range(2000):
        count.update(torch.tensor([(step // period) % 2]))
    assert count.frequency is not None
    assert count.frequency.item() == pytest.approx(1 / period, rel=0.03)
