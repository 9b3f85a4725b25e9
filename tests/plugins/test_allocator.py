from __future__ import annotations

import subprocess
import sys

import pytest

from gplq.plugins import allocator


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='glibc')
def test_large_blocks_come_back_without_page_faults() -> None:
    code = """
import resource, sys
import torch
from gplq.plugins.allocator import keep_freed_memory
if not keep_freed_memory():
    sys.exit(77)  # another C library
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
x = torch.ones(16 * 1024 * 1024)
# glibc 2.36 keeps seven of the small remainders that lie behind aligned blocks, which part these from free neighbors.
for _ in range(16):
    x.clone()
before = faults()
for _ in range(4):
    x.clone()
# 64 MB are 16384 pages, each of which a fresh mapping faults in.
assert faults() - before < 4000, faults() - before
"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=120)
    if done.returncode == 77:
        pytest.skip('no glibc')
    assert done.returncode == 0, done.stderr


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator.sys, 'platform', 'darwin')
    assert not allocator.keep_freed_memory()
