"""Steps of a pipeline: read an image, transform it as timm or torchvision do, pack it for the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torchvision.transforms.v2 as torchvision_transforms
from PIL import Image
from timm.data.transforms_factory import create_transform

from gplq.errors import DataError, RecipeError

__all__ = ['LoadImage', 'PackImage', 'TimmTransform', 'TorchvisionTransform']

Results = dict[str, Any]


class LoadImage:
    """Reads `img_path` as RGB into `img`; cuts it to `box` (x, y, width, height), where the data set gives one.

    Args:
        margin: how far the cut reaches beyond the box on each side, as a share of its size.
    """

    def __init__(self, margin: float = 0.0) -> None:
        self.margin = margin

    def __call__(self, results: Results) -> Results:
        try:
            with Image.open(results['img_path']) as image:
                picture = _rgb(image)
        except Exception as error:  # decoders raise anything
            raise DataError(
                f'{results["img_path"]} cannot be read as an image: {error}; mend it or take it out'
            ) from error
        if results.get('box') is not None:
            picture = picture.crop(_within(results['box'], self.margin, picture.size))
        return {**results, 'img': picture}


def _rgb(image: Image.Image) -> Image.Image:
    """Three channels of 8 bits; Pillow would cut 16-bit grey off at 255."""
    if image.mode.startswith('I'):
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    return image.convert('RGB')


def _within(box: Sequence[float], margin: float, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a box with its margin, inside an image and at least a pixel wide."""
    x, y, width, height = box
    left, top = max(0, round(x - margin * width)), max(0, round(y - margin * height))
    right = min(size[0], round(x + (1 + margin) * width))
    bottom = min(size[1], round(y + (1 + margin) * height))
    left, top = min(left, size[0] - 1), min(top, size[1] - 1)
    return left, top, max(right, left + 1), max(bottom, top + 1)


class TimmTransform:
    """`timm.data.create_transform`: image -> normalized tensor (3, H, W).

    Args:
        options: its own, such as `input_size`, `is_training`, `crop_pct`, `auto_augment`.

    Raises:
        RecipeError: timm does not take them.
    """

    def __init__(self, **options: Any) -> None:
        try:
            self.transform = create_transform(**options)
        except Exception as error:  # its parsers of settings raise anything
            reason = f'{type(error).__name__}: {error}'.splitlines()[0]
            raise RecipeError(f'TimmTransform: timm does not take {options}: {reason:.200}') from error

    def __call__(self, results: Results) -> Results:
        return {**results, 'img': self.transform(results['img'])}


class TorchvisionTransform:
    """Transforms of `torchvision.transforms.v2` in a row, each by its class's name and its arguments.

    Args:
        transforms: such as `[dict(type='Resize', size=256, interpolation='bicubic'), dict(type='ToImage'),
            dict(type='ToDtype', dtype='float32', scale=True)]`; kinds of interpolation and numbers go by their names.

    Raises:
        RecipeError: torchvision has no transform of a name, or it does not take its arguments.
    """

    def __init__(self, transforms: Sequence[dict[str, Any]]) -> None:
        steps = []
        for step in transforms:
            options = dict(step)
            name = options.pop('type', None)
            kind = getattr(torchvision_transforms, str(name), None)
            if not isinstance(kind, type):
                raise RecipeError(f'TorchvisionTransform: torchvision.transforms.v2 has no transform {name!r} (type)')
            try:
                steps.append(kind(**{key: _by_name(key, value) for key, value in options.items()}))
            except (TypeError, ValueError) as error:
                raise RecipeError(f'TorchvisionTransform: {name} does not take {options}: {error}') from error
        self.transform = torchvision_transforms.Compose(steps)

    def __call__(self, results: Results) -> Results:
        return {**results, 'img': self.transform(results['img'])}


def _by_name(option: str, value: Any) -> Any:
    """What a config can only name."""
    if option == 'interpolation' and isinstance(value, str):
        return torchvision_transforms.InterpolationMode(value)
    if option == 'dtype' and isinstance(value, str):
        found = getattr(torch, value, None)
        if not isinstance(found, torch.dtype):
            raise ValueError(f'torch has no {value!r}')
        return found
    return value


class PackImage:
    """Hands the model `inputs`, `labels` and `img_path`."""

    def __call__(self, results: Results) -> Results:
        return {'inputs': results['img'], 'labels': results['gt_label'], 'img_path': results['img_path']}
