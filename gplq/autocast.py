"""What autocast, which an operation of our own must ask itself, does to a product."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ['product_dtype']


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which torch multiplies ``x`` here; autocast leaves double precision alone."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)
