"""A hash of tensors and of what is said about them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ['fingerprint']


def fingerprint(tensors: Mapping[str, Tensor], description: str) -> str:
    """SHA-256 of names, types, shapes and values, in the order of the names, and of a text beside them."""
    digest = hashlib.sha256(description.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f'{name} {tensor.dtype} {tuple(tensor.shape)}'.encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
