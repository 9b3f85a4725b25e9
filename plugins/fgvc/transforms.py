"""Steps of a pipeline: read an image, transform it as timm or torchvision do, pack it for the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

import numpy as np
import torch
import torchvision.transforms.v2 as torchvision_transforms
from PIL import Image
from timm.data.transforms_factory import create_transform

from gplq.errors import DataError, RecipeError
from gplq.typecheck import check_types

__all__ = ['LoadImage', 'PackImage', 'TimmTransform', 'TorchvisionTransform', 'read_rgb']

Results = dict[str, Any]


class LoadImage:
    """Reads `img_path` as RGB into `img`; cuts it to `box` (x, y, width, height), where the data set gives one.

    Args:
        margin: how far the cut reaches beyond the box on each side, as a share of its size.

    Raises:
        RecipeError: `margin` is no number of at least 0.
    """

    def __init__(self, margin: float = 0.0) -> None:
        check_types({'margin': margin}, {'margin': float}, 'LoadImage: ')
        if not isfinite(margin) or margin < 0:
            raise RecipeError(f'LoadImage: margin={margin} must be a number of at least 0')
        self.margin = margin

    def __call__(self, results: Results) -> Results:
        picture = read_rgb(results['img_path'])
        box = results.get('box')
        if box is not None:
            x, y, width, height = box
            if x >= picture.width or y >= picture.height or x + width <= 0 or y + height <= 0:
                raise DataError(
                    f'{results["img_path"]} has {picture.width} x {picture.height} pixels and its box (x, y, width, '
                    f'height) = {list(box)} lies outside of it: mend the box, or read whole images by crop=False'
                )
            picture = picture.crop(_within(box, self.margin, picture.size))
        return {**results, 'img': picture}


def read_rgb(path: str) -> Image.Image:
    """An image file in three channels of 8 bits.

    Raises:
        DataError: it cannot be decoded, or its pixels are floating point or have more than 16 bits.
    """
    try:
        with Image.open(path) as image:
            return _rgb(image)
    except Exception as error:  # decoders raise anything
        raise DataError(f'{path} cannot be read as an image: {error}; mend it or take it out') from error


def _rgb(image: Image.Image) -> Image.Image:
    """Pillow would cut 16-bit grey off at 255, and floating point wherever its white is."""
    if image.mode == 'F':
        raise ValueError('its pixels are floating point, of which nobody knows what is white; store 8 or 16 bits')
    if image.mode.startswith('I'):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() >= 1 << 16:
            raise ValueError(
                f'its pixels go from {values.min()} to {values.max()}, of which nobody knows what is white; store 8 or '
                '16 bits'
            )
        # Some store 8 bits in 16 or 32.
        values = values >> 8 if values.max() > 255 else values
        image = Image.fromarray(values.astype(np.uint8))
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
        return {**results, 'img': self.transform(_image(results, 'TimmTransform'))}


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
        if not isinstance(transforms, (list, tuple)) or not all(isinstance(step, Mapping) for step in transforms):
            raise RecipeError(
                f'TorchvisionTransform: transforms={transforms!r} must be a list of dicts, such as '
                "[dict(type='Resize', size=256)]"
            )
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
        return {**results, 'img': self.transform(_image(results, 'TorchvisionTransform'))}


def _image(results: Results, step: str) -> Any:
    if 'img' not in results:
        raise RecipeError(f'{step}: no step before it has read the image; put LoadImage first in the pipeline')
    return results['img']


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
        return {'inputs': _image(results, 'PackImage'), 'labels': results['gt_label'], 'img_path': results['img_path']}
