"""``nn.GELU`` that computes its input anew where it can."""

from __future__ import annotations

from torch import Tensor, nn

from gplq.quantized_linear import source_of
from gplq.recomputed_gelu import recomputed_gelu

__all__ = ['RecomputedGELU']


class RecomputedGELU(nn.GELU):
    """The same function; behind a linear layer with a quantized input it keeps nothing for backward."""

    def forward(self, input: Tensor) -> Tensor:
        source = source_of(input)
        return super().forward(input) if source is None else recomputed_gelu(input, source, self.approximate)
