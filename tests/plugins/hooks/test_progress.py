"""How long work shows that it goes on."""

from __future__ import annotations

import io
import sys

import pytest
from mmengine.logging import MMLogger

from gplq.plugins.hooks import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_sees_a_bar_with_an_eta(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, 'stdout', screen)
    assert list(progress.logged_progress([5, 6], 'calibration')) == [5, 6]
    shown = screen.getvalue()
    assert shown.startswith('GPLQ calibration\n') and '2/2' in shown and 'ETA' in shown and shown.endswith('\n')


def test_a_log_gets_lines_from_time_to_time(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(MMLogger.get_current_instance(), 'info', lines.append)
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(progress.time, 'monotonic', lambda: float(next(clock)))
    assert list(progress.logged_progress(range(4), 'rounding')) == [0, 1, 2, 3]
    # Ten seconds each: a line after the second and after the fourth.
    assert lines == ['GPLQ rounding: 2 of 4, 20 s left', 'GPLQ rounding: 4 of 4, 0 s left']


def test_items_of_unknown_number(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(MMLogger.get_current_instance(), 'info', lines.append)
    monkeypatch.setattr(progress, '_EVERY', 0.0)
    assert list(progress.logged_progress((n for n in range(2)), 'samples')) == [0, 1]
    assert lines == ['GPLQ samples: 1', 'GPLQ samples: 2']
