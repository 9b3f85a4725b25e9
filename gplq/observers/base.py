"""What every observer offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from gplq.distributed import maximum, minimum, total, world_size
from gplq.errors import CalibrationError
from gplq.spec import QuantizerSpec

__all__ = ['Observer', 'Range', 'scale_from_range']


class Range(NamedTuple):
    """Lower and upper end of the values to represent, one pair a scale, each of shape ``(groups,)``."""

    low: Tensor
    high: Tensor


def scale_from_range(low: Tensor, high: Tensor, spec: QuantizerSpec) -> tuple[Tensor, Tensor | None]:
    """Step size (and offset in steps) at which ``spec`` just represents ``[low, high]``.

    Without offset the scale is ``max(|low| / |qmin|, |high| / qmax)``; an unsigned quantizer looks at ``high``
    alone. With offset the codes span the whole range. A range of zero width gets a step of 1, so that the
    single value zero is represented exactly. Shapes: ``(groups,)`` in and out.
    """
    if spec.offset:
        # Zero stays inside the range: padding and masked positions must not become the nearest bound.
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = (high - low) / (spec.qmax - spec.qmin)
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        return scale, low / scale - spec.qmin
    scale = high.clamp(min=0) / spec.qmax
    if spec.qmin < 0:
        scale = torch.maximum(scale, low.clamp(max=0) / spec.qmin)
    return torch.where(scale > 0, scale, torch.ones_like(scale)), None


class Observer(ABC):
    """Sees matrices of shape ``(groups, elements)``, one row a scale, and proposes a range a row."""

    def __init__(self) -> None:
        self.low: Tensor | None = None
        self.high: Tensor | None = None
        self.elements = 0

    def observe(self, groups: Tensor) -> None:
        """Take in one tensor.

        Raises:
            CalibrationError: if it holds NaN or infinite values.
        """
        low, high = torch.aminmax(groups.float(), dim=1)
        if not bool(torch.isfinite(low).all() and torch.isfinite(high).all()):
            raise CalibrationError('values that are not finite')
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)
        self.elements += groups.shape[1]
        self._collect(groups.float())

    def pool(self, groups: int, device: torch.device) -> None:
        """Take in what the other ranks have observed; ``groups`` and ``device`` are those of the tensors.

        A rank that was shown nothing joins as well: all must call this alike.
        """
        if world_size() == 1:
            return
        low = torch.full((groups,), torch.inf, device=device) if self.low is None else self.low
        high = torch.full((groups,), -torch.inf, device=device) if self.high is None else self.high
        low, high = minimum(low), maximum(high)
        self.elements = int(total(torch.tensor(self.elements, dtype=torch.long, device=device)))
        if self.elements:
            self.low, self.high = low, high
        self._pool(groups, device)

    @abstractmethod
    def _pool(self, groups: int, device: torch.device) -> None:
        """The same for what :meth:`_collect` has kept."""

    @property
    def seen(self) -> Range:
        """Smallest and largest value of each row.

        Raises:
            CalibrationError: if nothing was observed.
        """
        if self.low is None or self.high is None:
            raise CalibrationError('no value was observed')
        return Range(self.low, self.high)

    @property
    def signed(self) -> bool:
        """Whether any value was negative."""
        return bool((self.seen.low < 0).any())

    @abstractmethod
    def _collect(self, groups: Tensor) -> None:
        """Keep what :meth:`propose` needs."""

    @abstractmethod
    def range(self) -> Range:
        """The values that should be represented, before any bit width is known."""

    def propose(self, spec: QuantizerSpec) -> tuple[Tensor, Tensor | None]:
        """Scale and offset, each of shape ``(groups,)``."""
        return scale_from_range(*self.range(), spec)
