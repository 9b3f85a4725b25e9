"""JSON that runs leave behind, read with an error a user can act on."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
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


def read_points(path: str | os.PathLike[str], fields: Iterable[str]) -> list[dict[str, Any]]:
    """What a run noted along its way: a list of objects that have these fields at least.

    Raises:
        ResultError: it cannot be read or holds something else.
    """
    remedy = 'delete it to resume without what was measured before, or start the run again'
    try:
        points = read_json(path)
    except ResultError as error:
        raise ResultError(f'{error}; {remedy}') from None
    wanted = set(fields)
    if not isinstance(points, list) or not all(isinstance(p, dict) and wanted <= set(p) for p in points):
        raise ResultError(f'{os.fspath(path)} is no list of objects with {sorted(wanted)}; {remedy}')
    return points
