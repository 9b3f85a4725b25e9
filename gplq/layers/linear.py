"""``nn.Linear`` with quantizers."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from gplq.layers.linear_map import LinearMap

__all__ = ['QuantizedLinear']


class QuantizedLinear(nn.Linear):
    """A Linear whose input, and after the weight stage weight, is quantized; ``(..., in) -> (..., out)``."""

    quantization: LinearMap

    def forward(self, input: Tensor) -> Tensor:
        return self.quantization.run(F.linear, input, self.weight, self.bias)

    def apply_functional(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The same map where a parent calls ``F.linear(x, self.weight, bias)`` itself."""
        return self.quantization.run(F.linear, x, self.weight, bias)
