"""Finished steps of a long closed-form stage, kept in a folder, so that a killed run does not repeat them."""

from __future__ import annotations

import shutil
from pathlib import Path
from urllib.parse import quote

from torch import Tensor

from gplq.distributed import from_first, is_first
from gplq.files import write_bytes_atomically
from gplq.hashed_tensors import load_hashed, save_hashed

__all__ = ['Journal']

_KEY = 'key'


class Journal:
    """A file of tensors for every finished step.

    Steps of another start are thrown away. With several ranks the first one's folder counts for all.

    Args:
        folder: made if it is not there.
        key: what the stage starts from, see :func:`gplq.fingerprint.fingerprint`.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder = folder
        if not is_first():
            return
        noted = folder / _KEY
        if not noted.is_file() or noted.read_text() != key:
            self.clear()
            write_bytes_atomically(noted, key.encode())

    def recall(self, step: str) -> dict[str, Tensor] | None:
        """What was noted of a step; None if it is still to be done."""
        # A damaged step is done again.
        found = load_hashed(self._file(step)) if is_first() else None
        return from_first(found)

    def note(self, step: str, tensors: dict[str, Tensor]) -> None:
        """Keep the result of a step."""
        if is_first():
            save_hashed(self._file(step), tensors)

    def clear(self) -> None:
        """Forget every step."""
        if is_first():
            shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, step: str) -> Path:
        return self.folder / f'{quote(step, safe="")}.safetensors'
