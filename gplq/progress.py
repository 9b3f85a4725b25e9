"""How long work reports its progress without the core choosing a display."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

__all__ = ['Progress', 'no_progress']

# Wraps an iterable and is told what it stands for; tqdm fits behind a two-line adapter.
Progress = Callable[[Iterable[Any], str], Iterable[Any]]


def no_progress(items: Iterable[Any], label: str) -> Iterable[Any]:
    """Shows nothing."""
    return items
