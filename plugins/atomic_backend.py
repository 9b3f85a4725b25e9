"""Checkpoints that are replaced in one step, and deleted only once their successor is there."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook
from mmengine.runner import Runner

from gplq.files import write_bytes_atomically

__all__ = ['BACKEND_ARGS', 'AtomicBackend', 'save_atomically']

NAME = 'gplq.atomic'
BACKEND_ARGS = {'backend': NAME}


class AtomicBackend(LocalBackend):
    """Writes beside the file and moves; what is to be removed waits for the next file that is written.

    `CheckpointHook` deletes the oldest checkpoint before it writes the new one: killed in between, or with the disk
    full, a run with `max_keep_ckpts=1` would have none. mmengine makes an instance for every file, so the list of
    what waits is shared.
    """

    _waiting: ClassVar[list[str]] = []

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write bytes."""
        waiting = [Path(name) for name in self._waiting]
        # What waited for a file that could not be written stays.
        self._waiting.clear()
        write_bytes_atomically(filepath, obj)
        for path in waiting:
            if path.parent != Path(filepath).parent:
                self._waiting.append(str(path))
            elif path != Path(filepath):
                path.unlink(missing_ok=True)

    def put_text(self, obj: str, filepath: str | Path, encoding: str = 'utf-8') -> None:
        """Write text."""
        self.put(obj.encode(encoding), filepath)

    def remove(self, filepath: str | Path) -> None:
        """Remove a file once another one is written."""
        self._waiting.append(str(filepath))


register_backend(NAME, AtomicBackend, force=True)


def save_atomically(runner: Runner) -> None:
    """Have the run's checkpoint hooks write this way, where they write to local files in mmengine's own way."""
    for hook in runner.hooks:
        if not isinstance(hook, CheckpointHook) or hook.backend_args or hook.file_client_args:
            continue
        if '://' not in str(hook.out_dir or runner.work_dir):
            hook.backend_args = dict(BACKEND_ARGS)
