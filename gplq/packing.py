"""Codes of 2 to 8 bits in a row of bytes, without gaps: two 4-bit values share one."""

from __future__ import annotations

import torch
from torch import Tensor

from gplq.errors import CheckpointError

__all__ = ['pack', 'packed_bytes', 'unpack']


def packed_bytes(count: int, bits: int) -> int:
    """Bytes for ``count`` codes: ``ceil(count * bits / 8)``."""
    return (count * bits + 7) // 8


def pack(codes: Tensor, bits: int, *, signed: bool) -> Tensor:
    """Integer codes of any shape -> ``uint8`` bytes, lowest bits first; signed codes in two's complement."""
    values = codes.reshape(-1).to(torch.int64)
    if signed:
        values = values & (2**bits - 1)
    assert int(values.min()) >= 0 and int(values.max()) < 2**bits if values.numel() else True
    stream = ((values[:, None] >> torch.arange(bits)) & 1).to(torch.uint8).reshape(-1)
    stream = torch.nn.functional.pad(stream, (0, -len(stream) % 8))
    weights = (2 ** torch.arange(8)).to(torch.uint8)
    return (stream.reshape(-1, 8) * weights).sum(dim=1, dtype=torch.uint8)


def unpack(data: Tensor, count: int, bits: int, *, signed: bool) -> Tensor:
    """Inverse of :func:`pack`: ``count`` codes as ``int64``.

    Raises:
        CheckpointError: if there are fewer or more bytes than ``count`` codes take.
    """
    if data.dtype != torch.uint8 or data.numel() != packed_bytes(count, bits):
        raise CheckpointError(
            f'{data.numel()} bytes of {data.dtype} cannot hold {count} codes of {bits} bits: the file is damaged'
        )
    stream = ((data[:, None].to(torch.int64) >> torch.arange(8)) & 1).reshape(-1)[: count * bits]
    values = (stream.reshape(count, bits) << torch.arange(bits)).sum(dim=1)
    if signed:
        values = torch.where(values >= 2 ** (bits - 1), values - 2**bits, values)
    return values
