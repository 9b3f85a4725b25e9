"""The image size that a vision model says it is made for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ['blank_images', 'native_size']

# timm's and most models' name, mmdet's Swin's, mmpretrain's patch embeddings'.
_NAMES = ('img_size', 'pretrain_img_size', 'init_input_size')


def native_size(model: nn.Module) -> tuple[int, int] | None:
    """Height and width that the model or the first module in it to know one has; None where none does."""
    for module in model.modules():
        for name in _NAMES:
            size = getattr(module, name, None)
            if isinstance(size, int):
                return size, size
            if isinstance(size, Sequence) and len(size) == 2 and all(isinstance(n, int) for n in size):
                return int(size[0]), int(size[1])
    return None


def blank_images(model: nn.Module, count: int, size: tuple[int, int]) -> Tensor:
    """Images ``(count, channels, *size)`` of zeros, as many channels as the first convolution takes, on its device."""
    channels = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 3)
    device = next((p.device for p in model.parameters()), None)
    return torch.zeros(count, channels, *size, device=device)
