"""Small images of overlapping shapes with COCO annotations, drawn from a seed."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from gplq.errors import RecipeError

__all__ = ['CLASSES', 'SPLITS', 'Instance', 'ShapesSettings', 'draw_image', 'is_written', 'write_split']

CLASSES = ('disk', 'square', 'triangle', 'star', 'ring', 'cross')
SPLITS = ('train', 'val', 'test')

# Vertices are rounded to a sixteenth of a pixel and textures use integers only, so that every platform draws
# the same pixels: sines may differ in their last bit from one C library to the next.
SUBPIXEL = 16
# A shape that would leave less than this share of itself or of another one visible is moved elsewhere.
MIN_VISIBLE = 0.4
PLACEMENT_TRIALS = 20
# Below this distance (sum over the three channels) from the background's color a shape could not be seen.
MIN_CONTRAST = 120


@dataclass(frozen=True)
class ShapesSettings:
    """What the images look like: side and radii in pixels, the number of objects as an inclusive range."""

    size: int = 128
    min_objects: int = 2
    max_objects: int = 5
    min_radius: int = 12
    max_radius: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.min_objects <= self.max_objects:
            raise RecipeError(f'shapes: {self.min_objects} to {self.max_objects} objects an image: no range from 1 up')
        if not 4 <= self.min_radius <= self.max_radius <= self.size // 2:
            raise RecipeError(
                f'shapes: radii of {self.min_radius} to {self.max_radius} pixels do not fit images of '
                f'{self.size}; give at least 4 and at most half the size'
            )


@dataclass(frozen=True)
class Instance:
    """One shape: its class index, and the pixels of it that can be seen, (size, size) bool."""

    label: int
    mask: NDArray[np.bool_]


def _ellipse(radius: float, aspect: float, vertices: int = 40) -> NDArray[np.float64]:
    angle = 2 * math.pi * np.arange(vertices) / vertices
    return np.stack([radius * np.cos(angle), radius * aspect * np.sin(angle)], axis=1)


def _star(radius: float, aspect: float) -> NDArray[np.float64]:
    points = _ellipse(radius, aspect, vertices=10)
    points[1::2] *= 0.42
    return points


def _cross(radius: float, aspect: float) -> NDArray[np.float64]:
    arm = 0.32
    corners = [(-arm, -1), (arm, -1), (arm, -arm), (1, -arm), (1, arm), (arm, arm)]
    corners += [(arm, 1), (-arm, 1), (-arm, arm), (-1, arm), (-1, -arm), (-arm, -arm)]
    return np.array(corners) * (radius * 0.95, radius * 0.95 * aspect)


def _contours(label: int, radius: float, aspect: float) -> list[NDArray[np.float64]]:
    """Closed outlines about the origin; a point inside an odd number of them belongs to the shape."""
    match CLASSES[label]:
        case 'disk':
            return [_ellipse(radius, aspect)]
        case 'square':
            return [_ellipse(radius, 1.0, vertices=4) * (1, aspect)]
        case 'triangle':
            return [_ellipse(radius, aspect, vertices=3)]
        case 'star':
            return [_star(radius, aspect)]
        case 'ring':
            return [_ellipse(radius, aspect), _ellipse(radius * 0.55, aspect)]
        case 'cross':
            return [_cross(radius, aspect)]
        case name:
            raise AssertionError(name)


def _rasterize(contours: Iterable[NDArray[np.int64]], size: int) -> NDArray[np.bool_]:
    """Even-odd rule at pixel centers, exact in integers; contours of (n, 2) x, y in sixteenths of a pixel."""
    contours = list(contours)
    inside = np.zeros((size, size), dtype=bool)
    points = np.concatenate(contours)
    low = np.clip(points.min(axis=0) // SUBPIXEL, 0, size)
    high = np.clip(points.max(axis=0) // SUBPIXEL + 1, 0, size)
    x = (np.arange(low[0], high[0]) * SUBPIXEL + SUBPIXEL // 2)[None, :]
    y = (np.arange(low[1], high[1]) * SUBPIXEL + SUBPIXEL // 2)[:, None]
    crossed = inside[low[1] : high[1], low[0] : high[0]]
    for contour in contours:
        for (x0, y0), (x1, y1) in zip(contour, np.roll(contour, -1, axis=0), strict=True):
            if y0 == y1:
                continue
            spans = (y0 > y) != (y1 > y)
            left_of = (x - x0) * abs(y1 - y0) < (x1 - x0) * (y - y0) * (1 if y1 > y0 else -1)
            crossed ^= spans & left_of
    return inside


def _texture(rng: np.random.Generator, size: int, color: NDArray[np.int64]) -> NDArray[np.int64]:
    """Color plus smooth waves, stripes and grain, (size, size, 3) integers."""
    cells = int(rng.integers(2, 7))
    grid = rng.integers(-24, 25, size=(cells + 1, cells + 1, 3))
    position = np.arange(size) * cells
    cell, offset = position // size, position % size
    rows = grid[cell] * (size - offset)[:, None, None] + grid[cell + 1] * offset[:, None, None]
    weight = offset[None, :, None]
    texture = (rows[:, cell] * (size - weight) + rows[:, cell + 1] * weight) // (size * size)
    step_x, step_y, period = rng.integers(-4, 5), rng.integers(-4, 5), int(rng.integers(12, 48))
    phase = (np.arange(size)[None, :] * step_x + np.arange(size)[:, None] * step_y) % period
    texture += np.where(phase < period // 2, 1, -1)[..., None] * rng.integers(0, 13, size=3)
    texture += rng.integers(-6, 7, size=(size, size, 1))
    return np.asarray(texture + color, dtype=np.int64)


def _place(rng: np.random.Generator, label: int, settings: ShapesSettings) -> NDArray[np.bool_]:
    """A shape somewhere in the image, in a size uniform on a logarithmic scale."""
    low, high = math.log(settings.min_radius), math.log(settings.max_radius)
    radius = math.exp(rng.uniform(low, high))
    angle, aspect = rng.uniform(0, 2 * math.pi), rng.uniform(0.65, 1)
    center = rng.uniform(0, settings.size, size=2)
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    contours = [np.rint((c @ turn + center) * SUBPIXEL).astype(np.int64) for c in _contours(label, radius, aspect)]
    # A margin of the largest radius on all sides tells how much of the shape the border cuts off.
    margin = settings.max_radius + 1
    canvas = _rasterize([c + margin * SUBPIXEL for c in contours], settings.size + 2 * margin)
    mask = canvas[margin:-margin, margin:-margin]
    return mask if mask.sum() >= MIN_VISIBLE * canvas.sum() else np.zeros_like(mask)


def _color(rng: np.random.Generator, other: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
    while True:
        color = rng.integers(30, 226, size=3)
        if other is None or np.abs(color - other).sum() >= MIN_CONTRAST:
            return color


def draw_image(settings: ShapesSettings, split: str, index: int) -> tuple[NDArray[np.uint8], list[Instance]]:
    """Draw one image, (size, size, 3) RGB, and what can be seen in it; the arguments decide every pixel.

    Raises:
        RecipeError: the split is none of `SPLITS`.
    """
    if split not in SPLITS:
        raise RecipeError(f'shapes: no split {split!r}; one of {", ".join(SPLITS)}')
    rng = np.random.default_rng([settings.seed, SPLITS.index(split), index])
    background = _color(rng)
    image = _texture(rng, settings.size, background)
    areas: list[int] = []
    instances: list[Instance] = []
    for _ in range(rng.integers(settings.min_objects, settings.max_objects + 1)):
        label = int(rng.integers(len(CLASSES)))
        for _ in range(PLACEMENT_TRIALS):
            mask = _place(rng, label, settings)
            below = [instance.mask & ~mask for instance in instances]
            visible = all(
                m.sum() >= MIN_VISIBLE * area for m, area in zip(below, areas, strict=True)
            )  # counted against the whole shape, so that two neighbors cannot hide it bit by bit
            if mask.any() and visible:
                instances = [Instance(i.label, m) for i, m in zip(instances, below, strict=True)]
                instances.append(Instance(label, mask))
                areas.append(int(mask.sum()))
                image[mask] = _texture(rng, settings.size, _color(rng, background))[mask]
                break
    return np.clip(image, 0, 255).astype(np.uint8), instances


def _annotation(instance: Instance) -> dict[str, Any]:
    rle = coco_mask.encode(np.asfortranarray(instance.mask.astype(np.uint8)))
    return dict(
        category_id=instance.label + 1,
        segmentation=dict(size=[int(n) for n in rle['size']], counts=rle['counts'].decode('ascii')),
        bbox=[float(n) for n in coco_mask.toBbox(rle)],
        area=int(instance.mask.sum()),
        iscrowd=0,
    )


def _annotation_file(root: Path, split: str) -> Path:
    return root / 'annotations' / f'{split}.json'


def is_written(root: str | os.PathLike[str], split: str, images: int, settings: ShapesSettings) -> bool:
    """Whether `write_split` has finished here with these arguments."""
    path = _annotation_file(Path(root), split)
    if not path.is_file():
        return False
    content = json.loads(path.read_text(encoding='utf-8'))
    return bool(content['info'].get('settings') == asdict(settings) and len(content['images']) == images)


def write_split(
    root: str | os.PathLike[str],
    split: str,
    images: int,
    settings: ShapesSettings,
    progress: Callable[[range], Iterable[int]] = iter,
) -> Path:
    """Write `root/SPLIT/*.png` and `root/annotations/SPLIT.json`, the annotations last; return their path.

    Raises:
        RecipeError: fewer than one image.
        OSError: an image could not be written.
    """
    if images < 1:
        raise RecipeError(f'shapes: {images} images for {split}; give at least 1')
    root = Path(root)
    (root / split).mkdir(parents=True, exist_ok=True)
    path = _annotation_file(root, split)
    path.parent.mkdir(exist_ok=True)
    records: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in progress(range(images)):
        image, instances = draw_image(settings, split, index)
        name = f'{index:06d}.png'
        if not cv2.imwrite(str(root / split / name), image[:, :, ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 3]):
            raise OSError(f'shapes: cannot write {root / split / name}')
        records.append(dict(id=index + 1, file_name=name, width=settings.size, height=settings.size))
        for instance in instances:
            annotations.append(dict(id=len(annotations) + 1, image_id=index + 1, **_annotation(instance)))
    content = dict(
        info=dict(description='generated shapes', settings=asdict(settings)),
        images=records,
        annotations=annotations,
        categories=[dict(id=i + 1, name=name) for i, name in enumerate(CLASSES)],
    )
    temporary = path.with_suffix('.tmp')
    temporary.write_text(json.dumps(content), encoding='utf-8')
    temporary.replace(path)
    return path
