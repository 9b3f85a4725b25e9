"""Choose modules by name pattern, once, in one function."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from fnmatch import fnmatchcase

from gplq.errors import TargetError

__all__ = ['match_names']


def match_names(names: Iterable[str], patterns: Iterable[str], what: str) -> frozenset[str]:
    """Names that a pattern matches, directly or through a parent: ``'backbone'`` covers ``'backbone.fc'``.

    Raises:
        TargetError: if a pattern matches no name.
    """
    names = list(names)
    matched: set[str] = set()
    for pattern in patterns:
        found = {name for name in names if any(fnmatchcase(n, pattern) for n in _with_parents(name))}
        if not found:
            parents = sorted({p for name in names for p in _with_parents(name)})
            close = difflib.get_close_matches(pattern, parents, n=3, cutoff=0.3) or parents[:3]
            raise TargetError(f'{what} pattern {pattern!r} matches nothing; similar names: {close}')
        matched |= found
    return frozenset(matched)


def _with_parents(name: str) -> list[str]:
    parts = name.split('.')
    return ['.'.join(parts[:end]) for end in range(1, len(parts) + 1)]
