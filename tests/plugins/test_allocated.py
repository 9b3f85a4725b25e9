from __future__ import annotations

import pytest
import torch

from gplq.plugins import allocated
from gplq.plugins.allocated import watch_allocated


def test_the_peak_is_that_of_the_block_alone() -> None:
    before = torch.zeros(8 * 2**20)  # 32 MB that are there already
    with watch_allocated() as found:
        for _ in range(8):
            x = torch.ones(16 * 2**20)  # 64 MB, freed before the next
            x.add_(1)
            del x
        assert not before.any()
    if found.peak_mb is None:
        pytest.skip('no glibc')
    assert 64 <= found.peak_mb < 80


def test_other_systems_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocated.sys, 'platform', 'darwin')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with watch_allocated() as found:
        torch.ones(1000)
    assert found.peak_mb is None
