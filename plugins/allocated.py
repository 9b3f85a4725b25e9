"""How much memory a block of code has allocated at its peak, libraries and the heap's gaps left out."""

import ctypes
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ['Allocated', 'watch_allocated']

# Seconds between two looks at the heap of a CPU's process.
_INTERVAL = 0.001


class Allocated:
    """Filled in while the block of :func:`watch_allocated` runs."""

    #: Above what was allocated before the block; None where it cannot be known.
    peak_mb: float | None = None


@contextmanager
def watch_allocated() -> Iterator[Allocated]:
    """Watch what is allocated: by torch on a GPU, which counts it, or by the process, asking glibc each millisecond.

    A process holds more than that: what it freed and keeps, and gaps between blocks. Other C libraries than glibc
    since 2.33 are not asked.
    """
    result = Allocated()
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        yield result
        result.peak_mb = (torch.cuda.max_memory_allocated() - before) / 2**20
        return
    mallinfo2 = getattr(ctypes.CDLL(None), 'mallinfo2', None) if sys.platform.startswith('linux') else None
    if mallinfo2 is None:
        yield result
        return
    mallinfo2.restype = _Mallinfo

    def allocated() -> int:
        found = mallinfo2()
        return int(found.uordblks + found.hblkhd)

    before = allocated()
    peak, done = before, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, allocated())
            time.sleep(_INTERVAL)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield result
    finally:
        done.set()
        watcher.join()
        result.peak_mb = (peak - before) / 2**20


class _Mallinfo(ctypes.Structure):
    """glibc's ``struct mallinfo2``, see mallinfo(3)."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in 'arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost'.split()
    ]
