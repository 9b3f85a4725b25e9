"""Finished steps of a long closed-form stage, kept in a folder, so that a killed run does not repeat them."""

from __future__ import annotations

import shutil
from pathlib import Path
from urllib.parse import quote

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gplq.distributed import from_first, is_first
from gplq.files import write_atomically, write_bytes_atomically
from gplq.fingerprint import fingerprint

__all__ = ['Journal']

_KEY = 'key'
_HASH = 'sha256'


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
        found: dict[str, Tensor] | None = None
        if is_first() and self._file(step).is_file():
            found = _sound(self._file(step))
        return from_first(found)

    def note(self, step: str, tensors: dict[str, Tensor]) -> None:
        """Keep the result of a step."""
        if is_first():
            contiguous = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
            metadata = {_HASH: fingerprint(contiguous, '')}
            write_atomically(self._file(step), lambda temporary: save_file(contiguous, temporary, metadata=metadata))

    def clear(self) -> None:
        """Forget every step."""
        if is_first():
            shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, step: str) -> Path:
        return self.folder / f'{quote(step, safe="")}.safetensors'


def _sound(path: Path) -> dict[str, Tensor] | None:
    """The tensors of a file; None if it is damaged, so that the step is done again: no crash leaves such a file."""
    try:
        with safe_open(path, framework='pt') as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
            noted = (file.metadata() or {}).get(_HASH)
    except SafetensorError:
        return None
    return tensors if noted == fingerprint(tensors, '') else None
