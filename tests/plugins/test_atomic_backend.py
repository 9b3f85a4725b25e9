"""A checkpoint is deleted only once its successor is there."""

from __future__ import annotations

from pathlib import Path

import pytest

from gplq.plugins.atomic_backend import AtomicBackend


def test_what_is_removed_waits_for_its_successor(tmp_path: Path) -> None:
    old, new = tmp_path / 'epoch_1.pth', tmp_path / 'epoch_2.pth'
    old.write_bytes(b'old')
    AtomicBackend().remove(old)
    assert old.exists()
    AtomicBackend().put(b'new', new)
    assert not old.exists() and new.read_bytes() == b'new'


def test_it_stays_where_the_successor_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tmp_path / 'epoch_1.pth'
    old.write_bytes(b'old')
    AtomicBackend().remove(old)
    with monkeypatch.context() as patch:

        def full(path: str, content: bytes) -> None:
            raise OSError('no space left')

        patch.setattr('gplq.plugins.atomic_backend.write_bytes_atomically', full)
        with pytest.raises(OSError):
            AtomicBackend().put(b'new', tmp_path / 'epoch_2.pth')
    AtomicBackend().put(b'other', tmp_path / 'gplq_resume.pth')
    assert old.exists()


def test_a_file_of_another_folder_is_no_successor(tmp_path: Path) -> None:
    (tmp_path / 'a').mkdir()
    old = tmp_path / 'a' / 'epoch_1.pth'
    old.write_bytes(b'old')
    AtomicBackend().remove(old)
    AtomicBackend().put(b'other', tmp_path / 'b' / 'epoch_1.pth')
    assert old.exists()
    AtomicBackend().put(b'new', tmp_path / 'a' / 'epoch_2.pth')
    assert not old.exists()
