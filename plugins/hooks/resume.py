"""Points from which an interrupted activation stage goes on as if nothing had happened."""

from __future__ import annotations

import json
import uuid
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.runner import Runner

from gplq.errors import CheckpointError
from gplq.files import write_bytes_atomically
from gplq.plugins.atomic_backend import BACKEND_ARGS
from gplq.plugins.checkpoint_file import read_checkpoint
from gplq.plugins.hooks.settings import HookSettings

__all__ = [
    'RESUME',
    'ResumePointHook',
    'check_same_run',
    'check_same_stage',
    'describe_stage',
    'find_resume_point',
    'iteration_of',
    'mark_run',
    'save_resume_point',
]

RESUME = 'gplq_resume.pth'
LAST = 'last_checkpoint'
RUN = 'gplq_run'
# What may differ between the run that was interrupted and the one that goes on.
FREE = ('resume_interval', 'validate_fp32')


class ResumePointHook(Hook):
    """Writes everything that training needs every so many iterations, replacing the point before.

    It comes after every other hook, the averaging of weights and the schedulers among them. A one-epoch stage has no
    other checkpoint before its end.

    Args:
        interval: iterations; 0 leaves it to the config's own CheckpointHook.
    """

    priority = 'LOWEST'

    def __init__(self, interval: int) -> None:
        self.interval = interval

    def before_train_epoch(self, runner: Runner) -> None:
        """Keep what calibration and PCA have cost."""
        if self.interval and runner.iter == 0:
            save_resume_point(runner, epoch=0, iteration=0)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        done = runner.iter + 1
        # Gradients that wait for the rest of their accumulation are in no checkpoint.
        accumulated = getattr(runner.optim_wrapper, '_accumulative_counts', 1)
        if self.interval and done % (-(-self.interval // accumulated) * accumulated) == 0:
            save_resume_point(runner, epoch=runner.epoch, iteration=done)


def save_resume_point(runner: Runner, *, epoch: int, iteration: int) -> None:
    """Replace the run's resume point and name it as the checkpoint that `--resume` finds."""
    meta = {'epoch': epoch, 'iter': iteration}
    runner.save_checkpoint(runner.work_dir, RESUME, meta=meta, backend_args=dict(BACKEND_ARGS))
    if is_main_process():
        folder = Path(runner.work_dir)
        write_bytes_atomically(folder / LAST, str(folder / RESUME).encode())


def find_resume_point(work_dir: str) -> str | None:
    """The checkpoint from which `--resume` goes on, None if there is none.

    mmengine writes the name of the latest one in two steps; where it was interrupted between them, the one that has
    come furthest is taken.
    """
    folder = Path(work_dir)
    last = folder / LAST
    if last.is_file():
        named = last.read_text().strip()
        if named and ('://' in named or Path(named).is_file()):
            return named
    found = [path for pattern in (RESUME, 'iter_*.pth', 'epoch_*.pth') for path in sorted(folder.glob(pattern))]
    return str(max(found, key=iteration_of)) if found else None


def iteration_of(path: Path) -> int:
    """Steps behind a checkpoint, -1 where it cannot be read."""
    try:
        return int(read_checkpoint(str(path))['meta']['iter'])
    except (CheckpointError, KeyError, TypeError, ValueError):
        return -1


def mark_run(work_dir: str, run: str | None = None) -> str:
    """Give a run a mark of its own, kept in its folder and in its checkpoints; a resumed one keeps its mark."""
    mark = run or uuid.uuid4().hex
    if is_main_process():
        write_bytes_atomically(Path(work_dir) / RUN, mark.encode())
    return mark


def check_same_run(work_dir: str, mark: str | None, source: str) -> None:
    """Refuse the checkpoint of an earlier run in the same folder, which a new one has not replaced yet.

    Raises:
        CheckpointError: if it is of another run than the last one that began there.
    """
    last = Path(work_dir) / RUN
    if mark is not None and last.is_file() and last.read_text() != mark:
        raise CheckpointError(
            f'{source} was left by an earlier run in {work_dir}; the last one had come to no resume point: '
            'start it again without --resume'
        )


def describe_stage(settings: HookSettings, **more: Any) -> str:
    """What must be the same when the stage goes on, as text for a checkpoint's metadata."""
    values = {name: value for name, value in asdict(settings).items() if name not in FREE}
    recipe = values.pop('recipe')
    return json.dumps({**values, **recipe, **more})


def check_same_stage(meta: dict[str, Any], settings: HookSettings) -> dict[str, Any]:
    """Refuse to go on under other settings; give what the checkpoint says.

    Raises:
        CheckpointError: if a setting differs, or the checkpoint does not say.
    """
    try:
        theirs = json.loads(meta['gplq_stage'])
        ours = json.loads(describe_stage(settings))
        differing = [name for name in ours if theirs[name] != ours[name]]
    except (KeyError, TypeError, ValueError):
        raise CheckpointError('the checkpoint to resume does not say how its activation stage was set up') from None
    if differing:
        told = ', '.join(f'{name}: {theirs[name]} there, {ours[name]} here' for name in differing)
        raise CheckpointError(f'the run to resume was set up differently ({told}); give the same, or start anew')
    return dict(theirs)
