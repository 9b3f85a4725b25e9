"""Steps of a pipeline: read an image, transform it as timm or torchvision do, pack it for the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
                picture = image.convert('RGB')
        except Exception as error:  # decoders raise anything
            raise DataError(
                f'{results["img_path"]} cannot be read as an image: {error}; mend it or take it out'
            ) from error
        if results.get('box') is not None:
            picture = picture.crop(_within(results['box'], self.margin, picture.size))
        return {**results, 'img': picture}


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
    """

    def __init__(self, **options: Any) -> None:
        self.transform = create_transform(**options)

    def __call__(self, results: Results) -> Results:
        return {**results, 'img': self.transform(results['img'])}


class TorchvisionTransform:
    """Transforms of `torchvision.transforms.v2` in a row, each by its class's name and its arguments.

    Args:
        transforms: such as `[dict(type='Resize', size=256), dict(type='CenterCrop', size=224)]`.

    Raises:
        RecipeError: torchvision has no transform of a name.
    """

    def __init__(self, transforms: Sequence[dict[str, Any]]) -> None:
        steps = []
        for step in transforms:
            options = dict(step)
            name = options.pop('type')
            kind = getattr(torchvision_transforms, name, None)
            if kind is None:
                raise RecipeError(f'TorchvisionTransform: torchvision.transforms.v2 has no {name!r}')
            steps.append(kind(**options))
        self.transform = torchvision_transforms.Compose(steps)

    def __call__(self, results: Results) -> Results:
        return {**results, 'img': self.transform(results['img'])}


class PackImage:
    """Hands the model `inputs`, `labels` and `img_path`."""

    def __call__(self, results: Results) -> Results:
        return {'inputs': results['img'], 'labels': results['gt_label'], 'img_path': results['img_path']}
