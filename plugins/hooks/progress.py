"""Progress with an ETA: a bar on a terminal, and elsewhere nothing but the log's lines."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

from mmengine.dist import is_main_process
from mmengine.logging import MMLogger
from mmengine.utils import ProgressBar

__all__ = ['logged_progress']

# Seconds between lines: long work must show life without filling the log.
_EVERY = 15.0


def logged_progress(items: Iterable[Any], label: str) -> Iterator[Any]:
    """Pass items on and show how far they are, with the time that is left where their number is known."""
    logger = MMLogger.get_current_instance()
    total = len(items) if hasattr(items, '__len__') else None  # type: ignore[arg-type]
    if total and sys.stdout.isatty() and is_main_process():
        yield from _with_bar(items, f'GPLQ {label}', total)
        return
    start = last = time.monotonic()
    for number, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - last >= _EVERY:
            last = now
            left = '' if total is None else f', {(now - start) / number * (total - number):.0f} s left'
            logger.info(f'GPLQ {label}: {number}{"" if total is None else f" of {total}"}{left}')


def _with_bar(items: Iterable[Any], label: str, total: int) -> Iterator[Any]:
    print(label)
    bar = ProgressBar(total, file=sys.stdout)
    for item in items:
        yield item
        bar.update()
    print()
