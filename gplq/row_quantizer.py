"""The quantizer of attention maps whose rows have a scale each, found as they come."""

from __future__ import annotations

import torch
from torch import Tensor

from gplq.quantizer import Quantizer

__all__ = ['RowQuantizer', 'row_units']

# A row of zeros, a query that may look at nothing, is not divided by zero.
_NOTHING = 1e-20


def row_units(x: Tensor, axis: int = -1, signed: bool = False) -> Tensor:
    """The largest value along ``axis``, in FP32 and without gradient; in size where values are signed."""
    x = x.detach()
    largest = x.abs().amax(dim=axis, keepdim=True) if signed else x.amax(dim=axis, keepdim=True)
    return largest.to(torch.promote_types(largest.dtype, torch.float32)).clamp_(min=_NOTHING)


class RowQuantizer(Quantizer):
    """A quantizer whose rows, or columns, are each in units of their own largest value; see :class:`Quantizer`.

    The scale that is learned, a head each, is that of ``exp(score - largest score of the row)``, which is 1 at most in
    every row: each uses all codes, whether it looks at one position or at a thousand. With one scale for all rows,
    those that spread their attention round to zero. The row's largest value multiplies the product's result, as a
    softmax's denominator does in FlashAttention, so that integers are multiplied as before.
    """

    @property
    def axis(self) -> int:
        """Along which a row runs: the axis that the product sums over."""
        return -2 if self.spec.scheme == 'column' else -1

    def scale_of(self, x: Tensor) -> Tensor:
        return self.scale_over(x.shape[0]) * self.units(x)

    def _scale_at(self, split: Tensor) -> Tensor:
        return self.scale * self.units(split)

    def units(self, x: Tensor) -> Tensor:
        """What each row's scale is multiplied by, to broadcast against ``x``."""
        return row_units(x, self.axis, self.spec.signed is not False)
