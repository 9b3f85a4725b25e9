"""Cut a map into windows and put it together again."""

from torch import Tensor
from torch.nn import functional as F

__all__ = ['join_windows', 'split_windows']


def split_windows(x: Tensor, size: int) -> Tensor:
    """Pad a map with zeros at bottom and right and cut it: (N, H, W, C) -> (N * windows, size, size, C)."""
    batch, height, width, channels = x.shape
    x = F.pad(x, (0, 0, 0, -width % size, 0, -height % size))
    rows, columns = x.shape[1] // size, x.shape[2] // size
    x = x.reshape(batch, rows, size, columns, size, channels).transpose(2, 3)
    return x.reshape(batch * rows * columns, size, size, channels)


def join_windows(windows: Tensor, size: int, height: int, width: int) -> Tensor:
    """Undo `split_windows` and drop its padding: (N * windows, size, size, C) -> (N, height, width, C)."""
    rows, columns = -(-height // size), -(-width // size)
    x = windows.reshape(-1, rows, columns, size, size, windows.shape[-1]).transpose(2, 3)
    return x.reshape(-1, rows * size, columns * size, windows.shape[-1])[:, :height, :width]
