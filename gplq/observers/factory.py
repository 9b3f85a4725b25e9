"""Observers by the name a recipe gives them."""

from __future__ import annotations

from collections.abc import Callable

from gplq.errors import RecipeError
from gplq.observers.base import Observer
from gplq.observers.min_max import MinMaxObserver
from gplq.observers.mse import MSEObserver
from gplq.observers.percentile import PercentileObserver

__all__ = ['OBSERVERS', 'make_observer']

OBSERVERS: dict[str, Callable[[], Observer]] = {
    'min_max': MinMaxObserver,
    'percentile': PercentileObserver,
    'mse': MSEObserver,
}


def make_observer(name: str) -> Observer:
    """A fresh observer.

    Raises:
        RecipeError: if no observer has this name.
    """
    if name not in OBSERVERS:
        raise RecipeError(f'observer {name!r} is unknown: choose one of {sorted(OBSERVERS)}')
    return OBSERVERS[name]()
