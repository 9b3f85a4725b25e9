"""Statistics of several processes as one: sums, bounds and samples over all ranks; alone they are what they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, distributed

from gplq.errors import CalibrationError, GPLQError

__all__ = [
    'everywhere',
    'failing_together',
    'from_first',
    'gather_columns',
    'is_first',
    'maximum',
    'minimum',
    'rank',
    'total',
    'world_size',
]


_T = TypeVar('_T')


def world_size() -> int:
    """Processes that work together."""
    return distributed.get_world_size() if _together() else 1


def rank() -> int:
    """Which of them this is."""
    return distributed.get_rank() if _together() else 0


def is_first() -> bool:
    """Whether this is the process that writes files."""
    return rank() == 0


def from_first(value: _T) -> _T:
    """The first rank's value, on every rank."""
    if not _together():
        return value
    values = [value]
    distributed.broadcast_object_list(values, src=0)
    return values[0]


def total(x: Tensor) -> Tensor:
    """Sum over ranks, in place."""
    return _reduce(x, 'SUM')


def minimum(x: Tensor) -> Tensor:
    """Smallest over ranks, in place."""
    return _reduce(x, 'MIN')


def maximum(x: Tensor) -> Tensor:
    """Largest over ranks, in place."""
    return _reduce(x, 'MAX')


def everywhere(found: bool, device: torch.device) -> bool:
    """Whether something holds on every rank."""
    return bool(minimum(torch.tensor(float(found), device=device)))


def gather_columns(matrix: Tensor) -> Tensor:
    """Columns of all ranks side by side; ``(rows, own columns) -> (rows, all columns)``."""
    if world_size() == 1:
        return matrix
    counts = torch.zeros(world_size(), dtype=torch.long, device=matrix.device)
    counts[rank()] = matrix.shape[1]
    widths = total(counts).tolist()
    padded = matrix.new_zeros(matrix.shape[0], max(widths))
    padded[:, : matrix.shape[1]] = matrix
    parts = [torch.empty_like(padded) for _ in widths]
    distributed.all_gather(parts, padded)
    return torch.cat([part[:, :width] for part, width in zip(parts, widths, strict=True)], dim=1)


@contextmanager
def failing_together() -> Iterator[None]:
    """Let an error on one rank end all of them: the others would wait for it for ever.

    Raises:
        GPLQError: this rank's own.
        CalibrationError: where another rank's work failed.
    """
    error: GPLQError | None = None
    try:
        yield
    except GPLQError as raised:
        error = raised
    failed = False
    if _together():
        device = 'cuda' if distributed.get_backend() == 'nccl' else 'cpu'
        failed = bool(maximum(torch.tensor(float(error is not None), device=device)))
    if error is not None:
        raise error
    if failed:
        raise CalibrationError('another process has failed on its share of the data; its own log says why')


def _together() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def _reduce(x: Tensor, operation: str) -> Tensor:
    if x.numel() and _together():
        distributed.all_reduce(x, getattr(distributed.ReduceOp, operation))
    return x
