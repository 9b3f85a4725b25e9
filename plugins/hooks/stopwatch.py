"""The minutes that a stage itself takes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ['Stopwatch']


class Stopwatch:
    """Counts wall-clock minutes, and stands still while a model is measured.

    Args:
        minutes: what the run that is resumed had spent.
    """

    def __init__(self, minutes: float = 0.0) -> None:
        self._spent = 60 * minutes
        self._since: float | None = None

    @property
    def minutes(self) -> float:
        """What has been counted so far."""
        running = 0.0 if self._since is None else time.monotonic() - self._since
        return (self._spent + running) / 60

    def start(self) -> None:
        """Count on."""
        if self._since is None:
            self._since = time.monotonic()

    def stop(self) -> None:
        """Stand still."""
        self._spent, self._since = 60 * self.minutes, None

    @contextmanager
    def standing(self) -> Iterator[None]:
        """Stand still within the context."""
        self.stop()
        try:
            yield
        finally:
            self.start()
