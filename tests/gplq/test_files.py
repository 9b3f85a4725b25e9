"""Files are replaced in one step or not at all."""

from __future__ import annotations

import errno
import os
import signal
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from gplq.errors import WriteError
from gplq.files import write_atomically, write_bytes_atomically


@pytest.fixture
def umask() -> Iterator[Callable[[int], None]]:
    """Sets the process's file mode mask for one test."""
    before = os.umask(0o022)
    try:
        yield lambda mask: os.umask(mask) and None
    finally:
        os.umask(before)


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_content_and_folder(tmp_path: Path) -> None:
    path = tmp_path / 'a' / 'b' / 'file.bin'
    write_bytes_atomically(path, b'one')
    assert path.read_bytes() == b'one'
    write_bytes_atomically(str(path), b'two')
    assert path.read_bytes() == b'two'
    assert entries(path.parent) == ['file.bin']


@pytest.mark.parametrize(('mask', 'mode'), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_rights_are_those_of_any_new_file(tmp_path: Path, umask: Callable[[int], None], mask: int, mode: int) -> None:
    """A temporary file is its owner's alone; others could not read the checkpoint."""
    umask(mask)
    write_bytes_atomically(tmp_path / 'file', b'')
    assert stat.S_IMODE((tmp_path / 'file').stat().st_mode) == mode
    assert os.umask(mask) == mask


@pytest.mark.parametrize('error', [OSError(errno.ENOSPC, 'No space left on device'), KeyboardInterrupt()], ids=repr)
def test_a_write_that_fails_half_way_leaves_the_old_file(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / 'file'
    path.write_bytes(b'old')

    def write(temporary: str) -> None:
        assert Path(temporary).parent == tmp_path
        Path(temporary).write_bytes(b'ne')
        raise error

    with pytest.raises(type(error)):
        write_atomically(path, write)
    assert path.read_bytes() == b'old'
    assert entries(tmp_path) == ['file']


def test_nothing_is_left_of_a_first_write_that_fails(tmp_path: Path) -> None:
    def write(temporary: str) -> None:
        raise OSError(errno.ENOSPC, 'No space left on device')

    with pytest.raises(OSError, match='No space'):
        write_atomically(tmp_path / 'new' / 'file', write)
    assert entries(tmp_path / 'new') == []


def test_readers_see_the_old_file_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / 'file'
    path.write_bytes(b'old')

    def write(temporary: str) -> None:
        Path(temporary).write_bytes(b'new')
        assert path.read_bytes() == b'old'

    write_atomically(path, write)
    assert path.read_bytes() == b'new'


def test_content_is_on_the_disk_before_the_name_moves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a crash of the machine leaves the name on an empty file."""
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def sync(descriptor: int) -> None:
        done.append('sync folder' if stat.S_ISDIR(os.fstat(descriptor).st_mode) else 'sync file')
        fsync(descriptor)

    def move(source: str, target: Path) -> None:
        done.append('move')
        replace(source, target)

    monkeypatch.setattr(os, 'fsync', sync)
    monkeypatch.setattr(os, 'replace', move)
    write_bytes_atomically(tmp_path / 'file', b'content')
    assert done == ['sync file', 'move', 'sync folder']


def test_a_full_disk_under_torch_save_is_named(tmp_path: Path) -> None:
    resource = pytest.importorskip('resource')
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    (tmp_path / 'model.pth').write_bytes(b'old')
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        with pytest.raises(WriteError, match='model.pth cannot be written .*is kept'):
            write_atomically(tmp_path / 'model.pth', lambda path: torch.save(torch.zeros(1000), path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.name for path in tmp_path.iterdir()] == ['model.pth']
    assert (tmp_path / 'model.pth').read_bytes() == b'old'


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(WriteError, match='is a folder: give the name of a file in it'):
        write_bytes_atomically(tmp_path, b'new')
    assert tmp_path.is_dir()
