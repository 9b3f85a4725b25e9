"""Tensors of many sites within a memory budget: what does not fit lies in files until it is asked for."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import TracebackType

from safetensors.torch import load_file, save_file
from torch import Tensor

__all__ = ['SampleStore']


class SampleStore:
    """Keeps named groups of tensors, in memory up to a budget and behind that in a temporary folder.

    Args:
        megabytes: of tensors in memory.
        folder: where temporary files go; None takes the system's place for them.
    """

    def __init__(self, megabytes: float, folder: str | None = None) -> None:
        self._left = megabytes * 2**20
        self._kept: dict[str, list[Tensor]] = {}
        self._files: dict[str, list[tuple[Path, str]]] = {}
        self._written = 0
        self._folder = tempfile.TemporaryDirectory(prefix='gplq_samples_', dir=folder)

    def __enter__(self) -> SampleStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._folder.cleanup()

    def __contains__(self, name: str) -> bool:
        return name in self._kept or name in self._files

    @property
    def spilled(self) -> int:
        """Files that were written."""
        return sum(map(len, self._files.values()))

    def add(self, name: str, *tensors: Tensor) -> None:
        """Append tensors to those of a name."""
        size = sum(t.numel() * t.element_size() for t in tensors)
        if size <= self._left and name not in self._files:
            self._left -= size
            self._kept.setdefault(name, []).extend(tensors)
            return
        files = self._files.setdefault(name, [])
        path = Path(self._folder.name, f'{self._written}.safetensors')
        self._written += 1
        save_file({str(index): t.contiguous() for index, t in enumerate(tensors)}, path)
        files.append((path, str(tensors[0].device)))

    def read(self, name: str) -> list[Tensor]:
        """Every tensor of a name in the order in which they came."""
        tensors = list(self._kept.get(name, []))
        for path, device in self._files.get(name, []):
            stored = load_file(path, device=device)
            tensors += [stored[str(index)] for index in range(len(stored))]
        return tensors

    def take(self, name: str) -> list[Tensor]:
        """The same, and their memory and files are given up."""
        tensors = self.read(name)
        self._left += sum(t.numel() * t.element_size() for t in self._kept.pop(name, []))
        for path, _ in self._files.pop(name, []):
            path.unlink()
        return tensors
