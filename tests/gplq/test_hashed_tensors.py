"""Tensors come back from a sound file, and nothing from any other."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from gplq.hashed_tensors import load_hashed, save_hashed


def test_a_sound_file_gives_its_tensors_back_and_a_damaged_one_none(tmp_path: Path) -> None:
    path = tmp_path / 'tensors.safetensors'
    assert load_hashed(path) is None
    save_hashed(path, {'a': torch.arange(6.0).reshape(2, 3).T})
    found = load_hashed(path)
    assert found is not None and torch.equal(found['a'], torch.arange(6.0).reshape(2, 3).T)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert load_hashed(path) is None
    path.write_bytes(content[:20])
    assert load_hashed(path) is None
    save_file({'a': torch.ones(2)}, path)
    assert load_hashed(path) is None, 'without a hash'
