"""What a plan is made from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import nn

from gplq.recipe import Recipe
from gplq.targets import Targets
from gplq.trace import Trace

__all__ = ['Example']


@dataclass(frozen=True)
class Example:
    """A model, what is wanted of it, and what a forward pass of it showed."""

    model: nn.Module
    recipe: Recipe
    targets: Targets
    trace: Trace

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """Every module by its name; the root is ``''``."""
        return dict(self.model.named_modules())
