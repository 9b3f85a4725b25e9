"""Rounding that can be learned: each weight goes up or down as far as a variable between 0 and 1 says (AdaRound)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gplq.layers import WeightView
from gplq.weights import WeightScales, restore_weight

__all__ = ['SoftRounding']

# The sigmoid is stretched beyond 0 and 1 and cut there, so that it can arrive (Nagel et al. 2020, eq. 23).
_LOW, _HIGH = -0.1, 1.1


class SoftRounding(nn.Module):
    """The weight of one linear map with its rounding as a parameter; starts at the weight itself.

    Args:
        view: of the weight before rounding.
        scales: of its rows, in the domain in which it is rounded.
        bits: 2 to 8.
    """

    def __init__(self, view: WeightView, scales: WeightScales, bits: int) -> None:
        super().__init__()
        exact = view.matrix().float()
        self.view = view
        self.scales = scales
        self.column = view.map.column_scale.expand(exact.shape[1])
        steps = exact * self.column / scales.scale[:, None]
        if scales.zero_point is not None:
            steps = steps + scales.zero_point[:, None]
            self.bounds = (0, 2**bits - 1)
        else:
            self.bounds = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        self.floor = steps.floor()
        share = ((steps - self.floor) - _LOW) / (_HIGH - _LOW)
        self.logit = nn.Parameter(torch.logit(share.clamp(1e-4, 1 - 1e-4)))

    def up(self) -> Tensor:
        """How far each weight goes up, 0 to 1, ``(rows, columns)``."""
        return (torch.sigmoid(self.logit) * (_HIGH - _LOW) + _LOW).clamp(0, 1)

    def forward(self) -> Tensor:
        """The weight as it is now, ``(rows, columns)``."""
        return self.values(self.floor + self.up())

    def decided(self) -> Tensor:
        """Codes of where each weight tends, before they are cut to the bounds."""
        return self.floor + (self.up() >= 0.5)

    def indecision(self, sharpness: float) -> Tensor:
        """Sum over weights of ``1 - |2 up - 1| ** sharpness``, which is 0 where all have decided (eq. 24)."""
        return (1 - (2 * self.up() - 1).abs().pow(sharpness)).sum()

    @torch.no_grad()
    def settle(self) -> None:
        """Round each weight to where it tends and write it back."""
        codes = self.decided().clamp_(*self.bounds)
        quantizer = self.view.map.weight
        assert quantizer is not None
        self.view.write(quantizer.keep(restore_weight(codes, self.scales), self.column, self.scales))

    def values(self, codes: Tensor) -> Tensor:
        """The weight that codes stand for, ``(rows, columns)``."""
        return restore_weight(codes.clamp(*self.bounds), self.scales) / self.column
