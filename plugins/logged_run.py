"""One of our programs in a process of its own, with its output in a file; it ends when this one does."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from gplq.plugins.results import ResultError

__all__ = ['alone', 'check_tool', 'run_logged']

LOCK = '.lock'
# Seconds that a program has to end by itself.
PATIENCE = 10.0


def check_tool(tool: str) -> None:
    """Refuse to start from another folder than the repository's.

    Raises:
        ResultError: there is no such program here.
    """
    if not Path(tool).is_file():
        raise ResultError(f"there is no {tool} in {Path.cwd()}: start this program from the repository's folder")


def run_logged(arguments: Sequence[str], work_dir: Path) -> None:
    """Run a program; what it prints goes to `log.txt` in ``work_dir``.

    It does not outlive this call: Ctrl-C and SIGTERM end it, and what it has started, before they end this process.

    Raises:
        ResultError: it failed; the message has its last words and the place of the log.
    """
    log = work_dir / 'log.txt'
    with log.open('w') as file, _ended_by_sigterm():
        process = subprocess.Popen(arguments, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait()
        finally:
            _end(process)
    if code:
        text = log.read_text()
        reasons = re.findall(r'^(?:error: .*|[\w.]*Error: .*)', text, re.MULTILINE) or text.split('\n')[-2:-1]
        raise ResultError(f'failed: {reasons[-1] if reasons else "no reason given"}\nsee {log}')


@contextmanager
def alone(work_dir: Path) -> Iterator[None]:
    """Make a folder and let no other process of this kind work in it; the system lets go of it whatever happens.

    Raises:
        ResultError: another is at work there.
    """
    work_dir.mkdir(parents=True, exist_ok=True)
    with (work_dir / LOCK).open('w') as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ResultError(
                f'another process is at work in {work_dir}: wait for it, or give another --work-dir'
            ) from None
        yield


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM raise, so that what stands behind `finally` is done."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a program and the processes that it has started."""
    if process.poll() is not None:
        return
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(PATIENCE)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
        return
