"""Tensors in a file with a hash of them, so that a damaged file is known for one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gplq.files import write_atomically
from gplq.fingerprint import fingerprint

__all__ = ['load_hashed', 'save_hashed']

_HASH = 'sha256'


def save_hashed(path: str | os.PathLike[str], tensors: Mapping[str, Tensor]) -> None:
    """Write tensors and their hash in one step.

    Raises:
        WriteError: the file cannot be written; what was there before stays.
    """
    contiguous = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    metadata = {_HASH: fingerprint(contiguous, '')}
    write_atomically(path, lambda temporary: save_file(contiguous, temporary, metadata=metadata))


def load_hashed(path: str | os.PathLike[str]) -> dict[str, Tensor] | None:
    """The tensors of a file; None if there is none, or it is damaged, which no crash makes it."""
    if not Path(path).is_file():
        return None
    try:
        with safe_open(path, framework='pt') as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
            noted = (file.metadata() or {}).get(_HASH)
    except SafetensorError:
        return None
    return tensors if noted == fingerprint(tensors, '') else None
