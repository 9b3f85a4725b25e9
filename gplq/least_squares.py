"""Least squares from running sums, so that no feature is kept: the closed forms behind every compensation."""

from __future__ import annotations

import torch
from torch import Tensor

from gplq.distributed import total

__all__ = ['AffineFit', 'LinearFit', 'ridge_solve']


def ridge_solve(gram: Tensor, cross: Tensor, strength: float) -> Tensor:
    """``(gram + strength * mean(diag) * I)^-1 cross`` (QwT eq. 3 with a relative lambda); ``(d, d), (d, k) -> (d, k)``.

    In double precision: Gram matrices square the condition number.
    """
    damping = strength * gram.diagonal().mean().clamp(min=torch.finfo(gram.dtype).tiny)
    damped = gram + damping * torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
    factor, info = torch.linalg.cholesky_ex(damped)
    if int(info) == 0:
        return torch.cholesky_solve(cross, factor)
    solution: Tensor = torch.linalg.lstsq(damped, cross).solution
    return solution


class LinearFit:
    """Sums for ``y ~ x @ matrix + bias``.

    Args:
        inputs: width of x.
        outputs: width of y.
    """

    def __init__(self, inputs: int, outputs: int, device: torch.device | None = None) -> None:
        self.gram = torch.zeros(inputs + 1, inputs + 1, dtype=torch.float64, device=device)
        self.cross = torch.zeros(inputs + 1, outputs, dtype=torch.float64, device=device)
        self.squares = torch.zeros(outputs, dtype=torch.float64, device=device)

    @property
    def count(self) -> float:
        """Vectors added."""
        return float(self.gram[-1, -1])

    def add(self, x: Tensor, y: Tensor) -> None:
        """Take in ``x`` ``(..., inputs)`` and ``y`` ``(..., outputs)``."""
        x = x.reshape(-1, x.shape[-1]).float()
        y = y.reshape(-1, y.shape[-1]).float()
        x = torch.cat([x, x.new_ones(x.shape[0], 1)], dim=1)
        self.gram += (x.t() @ x).double()
        self.cross += (x.t() @ y).double()
        self.squares += y.double().square().sum(dim=0)

    def pool(self) -> None:
        """Take in what the other ranks have summed."""
        for sums in (self.gram, self.cross, self.squares):
            total(sums)

    def solve(self, strength: float) -> tuple[Tensor, Tensor]:
        """``matrix`` ``(inputs, outputs)`` and ``bias`` ``(outputs,)``; the bias is not shrunk."""
        count = self.gram[-1, -1].clamp(min=1)
        mean_x, mean_y = self.gram[-1, :-1] / count, self.cross[-1] / count
        centered = self.gram[:-1, :-1] - count * torch.outer(mean_x, mean_x)
        cross = self.cross[:-1] - count * torch.outer(mean_x, mean_y)
        matrix = ridge_solve(centered, cross, strength)
        return matrix, mean_y - mean_x @ matrix

    def r_squared(self, matrix: Tensor, bias: Tensor) -> float:
        """Explained share of the variance of the y that were added here, over all outputs together."""
        full = torch.cat([matrix, bias[None]]).double()
        residual = self.squares - 2 * (full * self.cross).sum(0) + (full * (self.gram @ full)).sum(0)
        count = self.gram[-1, -1].clamp(min=1)
        total = self.squares - self.cross[-1].square() / count
        return float(1 - residual.sum() / total.sum().clamp(min=torch.finfo(torch.float64).tiny))


class AffineFit:
    """Sums for ``target ~ gain * y + shift``, a channel each.

    Args:
        channels: width.
    """

    def __init__(self, channels: int, device: torch.device | None = None) -> None:
        self.sums = torch.zeros(6, channels, dtype=torch.float64, device=device)

    def add(self, y: Tensor, target: Tensor) -> None:
        """Take in both, ``(..., channels)``."""
        y = y.reshape(-1, y.shape[-1]).double()
        target = target.reshape(-1, target.shape[-1]).double()
        ones = torch.ones_like(y)
        terms = (ones, y, target, y * y, y * target, target * target)
        self.sums += torch.stack([term.sum(0) for term in terms])

    @property
    def count(self) -> float:
        """Vectors added."""
        return float(self.sums[0, 0])

    def pool(self) -> None:
        """Take in what the other ranks have summed."""
        total(self.sums)

    def solve(self) -> tuple[Tensor, Tensor]:
        """``gain`` and ``shift``, ``(channels,)``; a gain that is not positive becomes 1."""
        n, y, t, yy, yt, _ = self.sums
        n = n.clamp(min=1)
        variance = yy - y * y / n
        gain = (yt - y * t / n) / variance.clamp(min=1e-12)
        gain = torch.where((gain > 0) & (variance > 1e-9 * yy), gain, torch.ones_like(gain))
        return gain, (t - gain * y) / n

    def error(self, gain: Tensor, shift: Tensor) -> Tensor:
        """Sum of squared errors a channel of what was added here."""
        n, y, t, yy, yt, tt = self.sums
        total: Tensor = tt + gain**2 * yy + n * shift**2 - 2 * gain * yt - 2 * shift * t + 2 * gain * shift * y
        return total
