"""JSON that runs leave behind, read with an error a user can act on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gplq.plugins.results import ResultError

__all__ = ['read_json', 'read_points']


def read_json(path: str | os.PathLike[str]) -> Any:
    """Contents of a file.

    Raises:
        ResultError: it cannot be read or is no JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding='utf-8'))
    except OSError as error:
        raise ResultError(f'{os.fspath(path)} cannot be read: {error.strerror}') from None
    except (ValueError, RecursionError) as error:
        raise ResultError(f'{os.fspath(path)} is no JSON: {error}') from None


def read_points(path: str | os.PathLike[str], fields: Mapping[str, type]) -> list[dict[str, Any]]:
    """What a run noted along its way: a list of objects that have these fields at least, of these types.

    Raises:
        ResultError: it cannot be read or holds something else.
    """
    remedy = 'delete it to resume without what was measured before, or start the run again'
    try:
        points = read_json(path)
    except ResultError as error:
        raise ResultError(f'{error}; {remedy}') from None
    if not isinstance(points, list) or not all(isinstance(p, dict) and set(fields) <= set(p) for p in points):
        raise ResultError(f'{os.fspath(path)} is no list of objects with {sorted(fields)}; {remedy}')
    for number, point in enumerate(points):
        for name, kind in fields.items():
            # A whole number is a number with a point, too; JSON's true is an int to Python alone.
            fits = isinstance(point[name], (int, float) if kind is float else kind)
            if not fits or isinstance(point[name], bool):
                raise ResultError(
                    f'{os.fspath(path)}: {name} of entry {number} is {point[name]!r}, no {kind.__name__}; {remedy}'
                )
    return points
