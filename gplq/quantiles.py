"""Quantiles of rows."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ['PERCENTILES', 'row_quantiles']

# The upper ends that RepQ-ViT's released code compares; the lower ones mirror them.
PERCENTILES = (0.999, 0.9999, 0.99999)

# torch.quantile takes no more than 2 ** 24 values.
_VALUES = 2**22


def row_quantiles(matrix: Tensor, *shares: float) -> tuple[Tensor, ...]:
    """The quantile of each row at each share, with linear interpolation: tensors of shape ``(rows,)``."""
    wanted = torch.tensor(shares, device=matrix.device, dtype=matrix.dtype)
    parts = torch.split(matrix, max(1, _VALUES // matrix.shape[1]))
    return tuple(torch.cat([torch.quantile(part, wanted, dim=1) for part in parts], dim=1))
