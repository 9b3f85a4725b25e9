"""What validation found along a stage, and the minutes until then, as data in the working directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process
from mmengine.runner import Runner

from gplq.files import write_bytes_atomically
from gplq.plugins.json_files import read_points

__all__ = ['CURVE', 'Curve', 'read_curve']

CURVE = 'gplq_curve.json'


def read_curve(path: Path) -> list[dict[str, Any]]:
    """The points of a file.

    Raises:
        ResultError: it cannot be read or is no such file.
    """
    return read_points(path, {'iteration': int, 'minutes': float, 'metrics': dict})


class Curve:
    """The points of a learning curve; the file is rewritten after each."""

    def __init__(self) -> None:
        self._points: list[dict[str, Any]] = []

    def resume(self, runner: Runner) -> None:
        """Go on with the points of the interrupted run; those behind the point of resumption are measured again."""
        path = Path(runner.work_dir) / CURVE
        if path.is_file():
            self._points = [p for p in read_curve(path) if p['iteration'] <= runner.iter]

    def add(self, runner: Runner, metrics: dict[str, float], minutes: float) -> None:
        """Keep the figures of a validation, after so many minutes of the stage without validations."""
        self._points.append({'iteration': runner.iter, 'minutes': minutes, 'metrics': metrics})
        if is_main_process():
            path = Path(runner.work_dir) / CURVE
            write_bytes_atomically(path, json.dumps(self._points, indent=1).encode())
