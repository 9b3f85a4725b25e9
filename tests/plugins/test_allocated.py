from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from gplq.plugins import allocated
from gplq.plugins.allocated import watch_allocated

# In a process of its own: what earlier tests left is freed at any moment, inside the block as well.
BLOCK = """
import torch
from gplq.plugins.allocated import watch_allocated
before = torch.zeros(8 * 2**20)  # 32 MB that are there already
with watch_allocated() as found:
    for _ in range(8):
        x = torch.ones(16 * 2**20)  # 64 MB, freed before the next
        x.add_(1)
        del x
    assert not before.any()
print(found.peak_mb)
"""


def test_the_peak_is_that_of_the_block_alone() -> None:
    peak = subprocess.run([sys.executable, '-c', BLOCK], capture_output=True, text=True, check=True).stdout.strip()
    if peak == 'None':
        pytest.skip('no glibc')
    assert 64 <= float(peak) < 80


def test_other_systems_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocated.sys, 'platform', 'darwin')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with watch_allocated() as found:
        torch.ones(1000)
    assert found.peak_mb is None
