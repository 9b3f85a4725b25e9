"""Minutes are those of the work, on a clock that is set by hand."""

from __future__ import annotations

import pytest

from gplq.plugins.hooks.stopwatch import Stopwatch


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr('time.monotonic', lambda: now[0])
    return now


def test_it_counts_between_start_and_stop(clock: list[float]) -> None:
    watch = Stopwatch(minutes=2.0)
    clock[0] += 600
    assert watch.minutes == 2.0
    watch.start()
    clock[0] += 60
    assert watch.minutes == 3.0
    watch.stop()
    clock[0] += 600
    assert watch.minutes == 3.0


def test_it_stands_still_within_the_context_even_after_an_error(clock: list[float]) -> None:
    watch = Stopwatch()
    watch.start()
    clock[0] += 60
    with pytest.raises(KeyError), watch.standing():
        clock[0] += 600
        raise KeyError
    clock[0] += 60
    assert watch.minutes == 2.0
