"""Replace a file in one step: readers see the old one or the new one, whatever happens in between."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from gplq.errors import WriteError

__all__ = ['check_writable', 'remove_unfinished', 'write_atomically', 'write_bytes_atomically']


_UNFINISHED = '.gplq-tmp'


def remove_unfinished(folder: str | os.PathLike[str]) -> None:
    """Remove what writers that were killed have left in a folder; no other may be at work in it."""
    for path in Path(folder).glob(f'.*{_UNFINISHED}'):
        path.unlink(missing_ok=True)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Find out before the work whether its result can be written; the file's folder is made if there is none.

    Raises:
        WriteError: ``path`` is a folder, or its folder cannot be made or written.
    """
    path = _file(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise WriteError(f'{path} cannot be written ({error}): give another place') from error


def write_atomically(path: str | os.PathLike[str], write: Callable[[str], None]) -> None:
    """Have a file written beside its place, forced to the disk and moved there.

    Args:
        path: the file; its folder is made if there is none.
        write: writes all of it to the name that it is given.

    Raises:
        WriteError: ``path`` is a folder, the disk is full or the folder cannot be written; what was there before stays.
    """
    path = _file(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f'.{path.name}.', suffix=_UNFINISHED)
        os.close(handle)
        try:
            write(temporary)
            # A temporary file is its owner's alone; the result gets the rights of any new file.
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(temporary, 0o666 & ~umask)
            _force_to_disk(temporary)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        _force_to_disk(path.parent)
    # torch.save says RuntimeError of a disk that is full.
    except (OSError, RuntimeError, SafetensorError) as error:
        raise WriteError(f'{path} cannot be written ({error}); what was there before is kept') from error


def write_bytes_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """The same for content that is there already."""

    def write(temporary: str) -> None:
        Path(temporary).write_bytes(content)

    write_atomically(path, write)


def _file(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    if path.is_dir():
        raise WriteError(f'{path} is a folder: give the name of a file in it')
    return path


def _force_to_disk(path: str | os.PathLike[str]) -> None:
    """Without this a crash of the machine can leave the new name on old or empty content."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:  # Windows opens no folders
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
