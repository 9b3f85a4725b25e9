"""One of our programs in a process of its own, with its output in a file."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from gplq.plugins.results import ResultError

__all__ = ['check_tool', 'run_logged']


def check_tool(tool: str) -> None:
    """Refuse to start from another folder than the repository's.

    Raises:
        ResultError: there is no such program here.
    """
    if not Path(tool).is_file():
        raise ResultError(f"there is no {tool} in {Path.cwd()}: start this program from the repository's folder")


def run_logged(arguments: Sequence[str], work_dir: Path) -> None:
    """Run a program; what it prints goes to `log.txt` in ``work_dir``.

    Raises:
        ResultError: it failed; the message has its last words and the place of the log.
    """
    work_dir.mkdir(parents=True, exist_ok=True)
    log = work_dir / 'log.txt'
    with log.open('w') as file:
        done = subprocess.run(arguments, stdout=file, stderr=subprocess.STDOUT)
    if done.returncode:
        text = log.read_text()
        reasons = re.findall(r'^(?:error: .*|[\w.]*Error: .*)', text, re.MULTILINE) or text.split('\n')[-2:-1]
        raise ResultError(f'failed: {reasons[-1] if reasons else "no reason given"}\nsee {log}')
