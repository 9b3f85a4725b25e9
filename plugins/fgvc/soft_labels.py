"""A teacher's predictions for crops of the training images, stored once (multi-crop distillation)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gplq.errors import DataError
from gplq.files import write_atomically
from gplq.fingerprint import fingerprint

__all__ = ['PARTS', 'Crops', 'Seen', 'SoftLabels', 'soft_targets', 'top_chances', 'write_soft_labels']

VERSION = 2


@dataclass(frozen=True)
class Crops:
    """What is stored of the crops of some images; the leading axes are images and crops, or crops alone.

    Attributes:
        boxes: left, top, width and height in pixels of the image, `(…, 4)` int16.
        flips: whether the crop is mirrored, `(…)` bool.
        classes: the likeliest ones, `(…, k)` int16.
        chances: theirs, `(…, k)` float16.
    """

    boxes: Tensor
    flips: Tensor
    classes: Tensor
    chances: Tensor


@dataclass(frozen=True)
class Seen:
    """How the teacher saw a crop, and its student must.

    Attributes:
        size: its side.
        mean: taken from the channels, for images between 0 and 1.
        std: what they were divided by.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


PARTS = tuple(field.name for field in fields(Crops))


def top_chances(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` likeliest classes of logits `(…, classes)` and their chances, `(…, k)` each."""
    chances, classes = logits.float().softmax(dim=-1).topk(k, dim=-1)
    return classes.to(torch.int16), chances.to(torch.float16)


def soft_targets(crops: Crops, num_classes: int) -> Tensor:
    """Distributions `(…, num_classes)`: what the stored chances leave is spread over the other classes.

    That is FKD's marginal smoothing (Shen and Xing 2022, sec. 3.3).
    """
    chances = crops.chances.float()
    others = num_classes - chances.shape[-1]
    rest = (1 - chances.sum(dim=-1, keepdim=True)).clamp(min=0) / max(others, 1)
    full = rest.expand(*chances.shape[:-1], num_classes).clone()
    full.scatter_(-1, crops.classes.long(), chances)
    return full / full.sum(dim=-1, keepdim=True)


def write_soft_labels(
    path: str | Path, crops: Crops, paths: Sequence[str], num_classes: int, teacher: str, seen: Seen
) -> None:
    """Write crops of images, in the order of the data set.

    Args:
        path: where to.
        crops: of all images.
        paths: of the images, of which the last two parts are kept in a hash.
        num_classes: of the teacher.
        teacher: what the labels are from, for people.
        seen: how the teacher saw the crops.

    Raises:
        WriteError: the file cannot be written; what was there before stays.
    """
    tensors = {name: getattr(crops, name).contiguous() for name in PARTS}
    about = {'version': VERSION, 'images': names_hash(paths), 'num_classes': num_classes, 'teacher': teacher}
    about |= {'size': seen.size, 'mean': seen.mean, 'std': seen.std, 'sha256': fingerprint(tensors, '')}
    metadata = {'gplq_soft_labels': json.dumps(about)}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))


def names_hash(paths: Sequence[str]) -> str:
    """Hash of the images' names and order, wherever their folder lies."""
    names = '\n'.join('/'.join(Path(path).parts[-2:]) for path in paths)
    return hashlib.sha256(names.encode()).hexdigest()


class SoftLabels:
    """A file of soft labels, read an image at a time from the mapped file.

    Args:
        path: what `tools/store_soft_labels.py` wrote.

    Raises:
        DataError: it is missing, damaged, of another version or no such file.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        if not Path(path).is_file():
            raise DataError(f'soft labels {path} do not exist: write them with tools/store_soft_labels.py')
        try:
            with safe_open(path, framework='pt') as file:
                noted = (file.metadata() or {}).get('gplq_soft_labels')
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
        except SafetensorError as error:
            raise DataError(f'soft labels {path} cannot be read ({error}): write them anew') from None
        about = _parsed(noted)
        if about.get('version') != VERSION:
            raise DataError(
                f'{path} holds no soft labels of version {VERSION} (version {about.get("version")!r}): write them anew'
            )
        if set(tensors) != set(PARTS) or about.get('sha256') != fingerprint(tensors, ''):
            raise DataError(f'soft labels {path} are damaged, their checksum differs: copy or write them anew')
        self.num_classes, self.images = int(about['num_classes']), str(about['images'])
        self.seen = Seen(int(about['size']), tuple(about['mean']), tuple(about['std']))
        self.teacher = str(about['teacher'])
        self.shape = tuple(tensors['flips'].shape)
        self._file: Any = None

    def check(self, paths: Sequence[str], num_classes: int) -> None:
        """Compare with the data set that they are for.

        Raises:
            DataError: it has other images, another order, or another number of classes.
        """
        if len(paths) != self.shape[0] or names_hash(paths) != self.images:
            raise DataError(
                f'soft labels {self.path} are of {self.shape[0]} images, the data set has {len(paths)} or others, or '
                'in another order: write them anew for it'
            )
        if num_classes != self.num_classes:
            raise DataError(f'soft labels {self.path} have {self.num_classes} classes, the model {num_classes}')

    def crops(self, image: int, chosen: Sequence[int]) -> Crops:
        """Some crops of one image."""
        if self._file is None:
            # Opened where it is read: a worker process has a file of its own.
            self._file = safe_open(self.path, framework='pt').__enter__()
        rows = torch.as_tensor(list(chosen), dtype=torch.long)
        return Crops(**{name: self._file.get_slice(name)[image : image + 1][0][rows] for name in PARTS})

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, '_file': None}


def _parsed(text: str | None) -> dict[str, Any]:
    try:
        values = json.loads(text or '{}')
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}
