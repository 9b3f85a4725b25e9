"""A few hundred mutated files and recipes; the program's own help says how to try more."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).with_name('fuzz_readers.py')


def test_readers_take_mutated_input_or_refuse_it() -> None:
    done = subprocess.run([sys.executable, PROGRAM, '--inputs', '400'], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == '0 of 400 inputs failed, seeds 0 to 399'
