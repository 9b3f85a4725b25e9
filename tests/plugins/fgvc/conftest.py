"""Miniatures of the published layouts: a few images of noise each, drawn once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def draw(path: Path, seed: int = 0, size: tuple[int, int] = (12, 10)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def cub_root(tmp_path: Path) -> Path:
    """Three classes of four images; two of each are for training. The files are not in the order of the numbers."""
    root = tmp_path / 'CUB_200_2011'
    names = ['001.Black_footed_Albatross', '002.Laysan_Albatross', '003.Sooty_Albatross']
    images, labels, splits, named, boxes = [], [], [], [], []
    for number in range(1, 13):
        label = (number - 1) % 3
        path = f'{names[label]}/bird_{number}.jpg'
        draw(root / 'images' / path, seed=number)
        images.append(f'{number} {path}')
        labels.append(f'{number} {label + 1}')
        splits.append(f'{number} {int(number <= 6)}')
        boxes.append(f'{number} 2.0 3.0 {float(number % 4 + 1)} 5.0')
        if number > 6:
            named.append(f'{number} {"dev" if number < 10 else "test"}')
    (root / 'images.txt').write_text('\n'.join(reversed(images)) + '\n')
    (root / 'image_class_labels.txt').write_text('\n'.join(labels) + '\n')
    (root / 'train_test_split.txt').write_text('\n'.join(splits) + '\n')
    (root / 'bounding_boxes.txt').write_text('\n'.join(boxes) + '\n')
    (root / 'dev_test_split.txt').write_text('\n'.join(named) + '\n')
    (root / 'classes.txt').write_text('\n'.join(f'{n + 1} {name}' for n, name in enumerate(names)) + '\n')
    return root
