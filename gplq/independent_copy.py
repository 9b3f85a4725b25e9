"""A copy of a model that runs its own layers, whatever was put in the place of their methods."""

from __future__ import annotations

import copy
from types import FunctionType
from typing import TypeVar

from torch import nn

__all__ = ['independent_copy']

_Module = TypeVar('_Module', bound=nn.Module)


def independent_copy(model: _Module) -> _Module:
    """A deep copy whose modules have their classes' ``forward`` where the original's is a plain function.

    Activation checkpointing (mmengine's, for one) replaces the method by a closure around the original module, which
    a copy shares: it would run the original's weights. Methods and partials are copied with what they are bound to.
    """
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if isinstance(module.__dict__.get('forward'), FunctionType):
            del module.__dict__['forward']
    return twin
