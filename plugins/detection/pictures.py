"""Pictures of two detectors' predictions, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

__all__ = ['draw_predictions', 'side_by_side']

# Distinct on any background: fills are half transparent, outlines and names are not.
COLORS = ((230, 60, 60), (60, 140, 230), (60, 180, 75), (245, 180, 40), (150, 80, 200), (240, 110, 190))


def draw_predictions(
    image: NDArray[np.uint8], predictions: Sequence[dict[str, Any]], classes: Sequence[str], zoom: int = 3
) -> NDArray[np.uint8]:
    """Draw masks (where given), boxes, names and scores: (H, W, 3) RGB -> (zoom * H, zoom * W, 3) RGB.

    Predictions are in COCO's result format, category ids counted from 1 in the order of `classes`.
    """
    size = (image.shape[1] * zoom, image.shape[0] * zoom)
    picture = np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_NEAREST), dtype=np.uint8)
    for prediction in sorted(predictions, key=lambda p: p['score']):
        label = prediction['category_id'] - 1
        color = COLORS[label % len(COLORS)]
        if 'segmentation' in prediction:
            mask = coco_mask.decode(prediction['segmentation'])
            mask = cv2.resize(mask, size, interpolation=cv2.INTER_NEAREST).astype(bool)
            picture[mask] = picture[mask] // 2 + np.array(color, dtype=np.uint8) // 2
        x, y, width, height = (round(v * zoom) for v in prediction['bbox'])
        cv2.rectangle(picture, (x, y), (x + width, y + height), color, 1)
        text = f'{classes[label]} {prediction["score"]:.2f}'
        _write(picture, text, (x, max(y - 3, 9)), color)
    return picture


def side_by_side(pictures: Sequence[NDArray[np.uint8]], titles: Sequence[str]) -> NDArray[np.uint8]:
    """Put pictures of one size side by side, each under a title: n times (H, W, 3) -> (20 + H, n * W, 3)."""
    columns = []
    for picture, title in zip(pictures, titles, strict=True):
        head = np.full((20, picture.shape[1], 3), 255, dtype=np.uint8)
        _write(head, title, (4, 14), (0, 0, 0), 0.45)
        columns.append(np.concatenate([head, picture]))
    return np.concatenate(columns, axis=1)


def _write(
    picture: NDArray[np.uint8],
    text: str,
    position: tuple[int, int],
    color: tuple[int, int, int],
    size: float = 0.35,
) -> None:
    font = cv2.FONT_HERSHEY_SIMPLEX
    # A light rim keeps the letters readable on any background.
    cv2.putText(picture, text, position, font, size, (255, 255, 255), 3, cv2.LINE_AA)
    cv2.putText(picture, text, position, font, size, color, 1, cv2.LINE_AA)
