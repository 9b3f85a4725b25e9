"""Absolute and relative positions of a plain ViT, resized to the map at hand."""

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ['absolute_positions', 'relative_bias', 'relative_positions', 'resize_grid', 'resize_table']


def resize_grid(grid: Tensor, height: int, width: int) -> Tensor:
    """Resize learned absolute positions bicubically: (1, h, w, C) -> (1, height, width, C)."""
    if tuple(grid.shape[1:3]) == (height, width):
        return grid
    maps = grid.permute(0, 3, 1, 2).float()
    resized = F.interpolate(maps, size=(height, width), mode='bicubic', align_corners=False)
    return resized.permute(0, 2, 3, 1).to(grid.dtype)


def resize_table(table: Tensor, length: int) -> Tensor:
    """Resize learned relative positions linearly: (L, d) -> (length, d)."""
    if table.shape[0] == length:
        return table
    lines = table.t().unsqueeze(0).float()
    return F.interpolate(lines, size=length, mode='linear', align_corners=False)[0].t().to(table.dtype)


def absolute_positions(pos_embed: Tensor, height: int, width: int) -> Tensor:
    """Resize a square of positions and drop the class token's: (1, 1 + s * s, C) -> (1, height, width, C)."""
    side = round((pos_embed.shape[1] - 1) ** 0.5)
    return resize_grid(pos_embed[:, 1:].reshape(1, side, side, -1), height, width)


def relative_positions(table: Tensor, size: int) -> Tensor:
    """Look up the vector of every distance on an axis, resized when needed: (L, d) -> (size, size, d).

    Entry (i, j) belongs to a query at i and a key at j: row i - j + size - 1 of the table.
    """
    position = torch.arange(size, device=table.device)
    return resize_table(table, 2 * size - 1)[position[:, None] - position[None, :] + size - 1]


def relative_bias(query: Tensor, table_h: Tensor, table_w: Tensor, height: int, width: int) -> Tensor:
    """Multiply queries with distances in rows and columns (MViTv2, eq. 4): (N, h, HW, d) -> (N, h, HW, HW).

    The query is not scaled by 1 / sqrt(d).
    """
    batch, heads, _, dim = query.shape
    grid = query.reshape(batch, heads, height, width, dim)
    rows = torch.einsum('bnhwc,hkc->bnhwk', grid, relative_positions(table_h, height).to(query.dtype))
    columns = torch.einsum('bnhwc,wkc->bnhwk', grid, relative_positions(table_w, width).to(query.dtype))
    bias = rows[..., :, None] + columns[..., None, :]
    return bias.reshape(batch, heads, height * width, height * width)
