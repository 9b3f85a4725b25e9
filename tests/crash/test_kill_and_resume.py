"""The crash test at one moment of each model and stage; its own help says how to run more."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name('kill_and_resume.py')


@pytest.mark.slow
def test_killed_runs_end_at_the_same_bits() -> None:
    command = [sys.executable, str(SCRIPT), '--moments', '1']
    one_thread = {**os.environ, 'OMP_NUM_THREADS': '1'}
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, env=one_thread)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == '4 of 4 killed runs ended at the same bits'
