"""One call of a site that is searched over: what is rounded, what it is multiplied by, what should come out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

__all__ = ['SiteCall']


class SiteCall(NamedTuple):
    """Values ``(…, n, k)`` on the left of a product or ``(…, k, m)`` on its right; the target is ``(…, n, m)``."""

    values: Tensor
    other: Tensor
    is_left: bool
    target: Tensor
    # What squared errors are weighed by, of the target's shape.
    weight: Tensor

    def output(self, values: Tensor) -> Tensor:
        """The product with these in the place of ``values``; they may have further axes in front."""
        return values @ self.other if self.is_left else self.other @ values

    def pieces(self, size: float, heads: int) -> Iterator[SiteCall]:
        """Parts of at most ``size`` bytes of work for one candidate, where the first axis can be divided.

        Args:
            size: in bytes.
            heads: that lie in the first axis and must stay together, 0 if none do.
        """
        count = len(self.target)
        whole = self.cost
        step = count if whole <= size else max(1, int(count * size / whole))
        if heads:
            step = max(heads, step // heads * heads)
        if step >= count or self.target.dim() < 3 and not self.is_left:
            yield self
            return
        for start in range(0, count, step):
            values, other, target, weight = (
                x.narrow(0, start, min(step, count - start)) if divides else x
                for x, divides in (
                    (self.values, self._divides(self.values, self.is_left)),
                    (self.other, self._divides(self.other, not self.is_left)),
                    (self.target, True),
                    (self.weight, True),
                )
            )
            yield SiteCall(values, other, self.is_left, target, weight)

    @property
    def cost(self) -> float:
        """Bytes that one candidate takes while its error is found."""
        return 4.0 * (5 * self.values.numel() + 4 * self.target.numel())

    def _divides(self, x: Tensor, left: bool) -> bool:
        """Whether an operand's first axis is the target's: a matrix on the right has columns of the sum there."""
        return x.dim() == self.target.dim() and len(x) == len(self.target) and (x.dim() > 2 or left)
