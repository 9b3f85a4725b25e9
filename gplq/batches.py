"""Calibration batches: how many samples they hold, whether they are sound, how the model takes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gplq.errors import CalibrationError

__all__ = [
    'Forward',
    'batch_size',
    'bounded',
    'default_forward',
    'first_samples',
    'rereadable',
    'tensors_in',
    'to_device',
]

Forward = Callable[[nn.Module, Any], Any]


def default_forward(model: nn.Module, batch: Any) -> Any:
    """Run a batch that is a tensor, ``(inputs, labels, ...)`` or a mapping of arguments."""
    parameter = next(model.parameters(), None)
    batch = batch if parameter is None else to_device(batch, parameter.device)
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (list, tuple)):
        return model(batch[0])
    return model(batch)


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with all its tensors on ``device``."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        values = [to_device(value, device) for value in batch]
        return type(batch)(*values) if hasattr(batch, '_fields') else type(batch)(values)
    return batch


def tensors_in(batch: Any, place: str = '') -> dict[str, Tensor]:
    """The tensors of a batch by where they are; what is no container of tensors is passed over."""
    if isinstance(batch, Tensor):
        return {place: batch}
    entries: Iterable[tuple[Any, Any]] = ()
    if isinstance(batch, Mapping):
        entries = batch.items()
    elif isinstance(batch, (list, tuple)):
        entries = enumerate(batch)
    return {name: tensor for key, value in entries for name, tensor in tensors_in(value, f'{place}.{key}').items()}


def batch_size(batch: Any) -> int:
    """Samples in a batch: a tensor's first axis, a list's images, or the first entry of a tuple or mapping."""
    if isinstance(batch, Tensor):
        return int(batch.shape[0]) if batch.dim() else 1
    if isinstance(batch, Mapping):
        return batch_size(batch['inputs'] if 'inputs' in batch else next(iter(batch.values()), ()))
    if isinstance(batch, (list, tuple)) and batch:
        images = all(isinstance(x, Tensor) and x.dim() == 3 for x in batch)
        return len(batch) if images else batch_size(batch[0])
    return 0


def first_samples(batches: Iterable[Any], samples: int) -> Iterator[Any]:
    """Batches until ``samples`` are reached; not one more is drawn."""
    seen = 0
    for batch in batches:
        yield batch
        seen += batch_size(batch)
        if seen >= samples:
            return


def rereadable(batches: Iterable[Any], samples: int) -> Iterable[Any]:
    """``batches``; where they can be read only once, a list of those that hold the first ``samples``."""
    return list(first_samples(batches, samples)) if isinstance(batches, Iterator) else batches


def bounded(batches: Iterable[Any], samples: int) -> Iterator[Any]:
    """Batches until ``samples`` are reached, each checked.

    Raises:
        CalibrationError: if there is no batch, or one is empty or not finite.
    """
    number = -1
    for number, batch in enumerate(first_samples(batches, samples)):
        if batch_size(batch) == 0:
            raise CalibrationError(f'calibration batch {number} is empty')
        for x in tensors_in(batch).values():
            if x.is_floating_point() and not bool(torch.isfinite(x).all()):
                raise CalibrationError(
                    f'calibration batch {number} holds NaN or infinite values; check the images and normalization'
                )
        yield batch
    if number < 0:
        raise CalibrationError('there is no calibration batch: the data set or loader is empty')
