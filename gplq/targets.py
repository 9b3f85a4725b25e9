"""Choose modules by name pattern."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn

from gplq.errors import TargetError
from gplq.recipe import Recipe

__all__ = ['Targets', 'match_names']


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


class Targets:
    """The names that a recipe's patterns choose, and why the others are left."""

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        modules = {name: module for name, module in model.named_modules() if name}
        kinds = (nn.Linear, nn.Conv2d, nn.MultiheadAttention)
        candidates = [name for name, module in modules.items() if isinstance(module, kinds)]
        if not candidates:
            raise TargetError(f'{type(model).__name__} has no Linear, Conv2d or MultiheadAttention to quantize')
        matched = match_names(candidates, recipe.targets, 'targets')
        skipped = match_names(modules, recipe.skip, 'skip') if recipe.skip else frozenset()
        self.layers = matched - skipped
        if not self.layers:
            raise TargetError(f'skip={recipe.skip} leaves nothing of targets={recipe.targets}')
        self.multiheads = tuple(
            name for name in candidates if name in self.layers and isinstance(modules[name], nn.MultiheadAttention)
        )
        self._recipe = recipe
        self._skipped = skipped
        self._all = match_names(modules, recipe.targets, 'targets')

    def covers(self, module: str) -> bool:
        """Whether products of this module (the root is ``''``) are to be quantized."""
        if module == '':
            return '*' in self._recipe.targets
        return module in self._all and module not in self._skipped

    def reason(self, name: str) -> str:
        """Why a layer that could be quantized is not targeted."""
        return 'named in skip' if name in self._skipped else 'outside targets'
