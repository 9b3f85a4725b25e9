"""``nn.Conv2d`` with quantizers."""

from __future__ import annotations

from torch import Tensor, nn

from gplq.layers.linear_map import LinearMap

__all__ = ['QuantizedConv2d']


class QuantizedConv2d(nn.Conv2d):
    """A convolution whose input (one scale) and weight (one an output channel) are quantized; NCHW."""

    quantization: LinearMap

    def forward(self, input: Tensor) -> Tensor:
        return self.quantization.run(self._conv_forward, input, self.weight, self.bias)
