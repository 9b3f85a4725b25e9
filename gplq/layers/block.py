"""A transformer block with QwT's linear compensation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gplq.quantizer import Quantizer
from gplq.single_precision import SinglePrecision
from gplq.spec import QuantizerSpec

__all__ = ['CompensatedBlock', 'LinearCompensation']


class LinearCompensation(SinglePrecision):
    """``x @ matrix + bias`` on integers: QwT (eq. 3) with input and matrix quantized.

    The input has one scale a channel, folded into the matrix before that is rounded; the matrix has one scale
    a column.

    Args:
        channels: width of the block.
        bits: of matrix and input.
    """

    codes: Tensor
    scale: Tensor
    bias: Tensor

    def __init__(self, channels: int, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.input = Quantizer(QuantizerSpec(bits, granularity='channel'), (channels,))
        self.register_buffer('codes', torch.zeros(channels, channels, dtype=torch.int8))
        self.register_buffer('scale', torch.ones(channels))
        self.register_buffer('bias', torch.zeros(channels))

    @torch.no_grad()
    def fit(self, matrix: Tensor, bias: Tensor, largest_input: Tensor) -> None:
        """Round ``matrix`` ``(channels in, channels out)``; ``largest_input`` is max|x| a channel."""
        largest = 2 ** (self.bits - 1) - 1
        self.input.initialize(_positive(largest_input / largest), None, signed=True, elements=1)
        matrix = matrix * self.input.scale[:, None]
        scale = _positive(matrix.abs().amax(dim=0) / largest)
        self.codes.copy_((matrix / scale).round().clamp(-largest, largest))
        self.scale.copy_(scale)
        self.bias.copy_(bias)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., channels) -> (..., channels)``."""
        codes = self.input.codes(x)
        y: Tensor = (codes @ self.codes.to(codes.dtype)) * self.scale + self.bias
        return y.to(x.dtype)


def _positive(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, scale, torch.ones_like(scale))


class CompensatedBlock(nn.Module):
    """Adds the compensation of the block's input to its output."""

    compensation: LinearCompensation

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
        compensation: Tensor = self.compensation(x)
        return y + compensation
