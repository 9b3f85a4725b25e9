"""Finished steps of a long closed-form stage, kept in a folder, so that a killed run does not repeat them."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from urllib.parse import quote

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gplq.distributed import from_first, is_first
from gplq.files import write_atomically, write_bytes_atomically

__all__ = ['Journal', 'fingerprint']

_KEY = 'key'


def fingerprint(model: nn.Module, settings: str) -> str:
    """Hash of everything that a stage starts from: all tensors of the model, and its settings as text."""
    digest = hashlib.sha256(settings.encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class Journal:
    """A file of tensors for every finished step.

    Steps of another start are thrown away. With several ranks the first one's folder counts for all.

    Args:
        folder: made if it is not there.
        key: what the stage starts from, see :func:`fingerprint`.
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
            try:
                found = load_file(self._file(step))
            except SafetensorError:
                # Not from a crash, which leaves whole files: the step is done again.
                found = None
        return from_first(found)

    def note(self, step: str, tensors: dict[str, Tensor]) -> None:
        """Keep the result of a step."""
        if is_first():
            contiguous = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
            write_atomically(self._file(step), lambda temporary: save_file(contiguous, temporary))

    def clear(self) -> None:
        """Forget every step."""
        if is_first():
            shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, step: str) -> Path:
        return self.folder / f'{quote(step, safe="")}.safetensors'
