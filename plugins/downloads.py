"""Checkpoints at an address, read with the care that files are read with."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from mmengine.runner import checkpoint

from gplq.errors import CheckpointError
from gplq.plugins.checkpoint_file import read_checkpoint

__all__ = ['download', 'read_downloads_safely']


def read_downloads_safely() -> None:
    """Let mmengine read downloads without executing anything in them.

    It hands them to torch's full unpickler: `torch.hub.load_state_dict_from_url` restricts nothing unless it is told
    to. Addresses such as `torchvision://` and `open-mmlab://` end in the same function.
    """
    checkpoint.load_url = _load


def _load(url: str, model_dir: str | None = None, map_location: Any = None, progress: bool = True) -> dict[str, Any]:
    """Read a checkpoint to the CPU's memory, with the signature of what it stands in for."""
    return read_checkpoint(str(download(url, model_dir, progress=progress)))


def download(url: str, model_dir: str | None = None, *, progress: bool = True) -> Path:
    """The file in torch's cache, or in ``model_dir``, that came from an address; fetched if it is not there yet.

    Raises:
        CheckpointError: if it cannot be fetched.
    """
    folder = Path(model_dir or Path(torch.hub.get_dir(), 'checkpoints'))
    path = folder / Path(urlparse(url).path).name
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), progress=progress)
        except (OSError, RuntimeError, ValueError) as error:  # network, hash and address
            raise CheckpointError(
                f'checkpoint {url} cannot be downloaded ({error}); fetch it by other means and give its path'
            ) from None
    return path
