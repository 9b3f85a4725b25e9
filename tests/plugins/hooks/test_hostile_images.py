"""Images and annotations that are broken or odd: the promise that docs/bad-input.md makes for each."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mmengine.config import Config
from mmengine.runner import Runner
from PIL import Image

from gplq.errors import DataError

Annotations = dict[str, Any]


@pytest.fixture
def train_on(
    shapes_root: Path, detector: Callable[..., Runner], tmp_path: Path
) -> Callable[[Callable[[Path, Annotations], None]], Runner]:
    """Trains on the shapes after a change to the images and the annotations."""

    def run(spoil: Callable[[Path, Annotations], None], workers: int = 0) -> Runner:
        root = tmp_path / 'spoiled'
        shutil.copytree(shapes_root, root)
        file = root / 'annotations' / 'train.json'
        annotations = json.loads(file.read_text())
        spoil(root / 'train', annotations)
        file.write_text(json.dumps(annotations))

        def change(config: Config) -> None:
            config.train_dataloader.dataset.data_root = str(root)
            config.train_dataloader.num_workers = workers

        runner = detector(change=change, validate_fp32=False)
        runner.train()
        return runner

    return run


def ended_in_four_bits(runner: Runner) -> bool:
    steps = json.loads((Path(runner.work_dir) / 'gplq.json').read_text())
    return [step['step'] for step in steps] == ['W32A4', 'W4A4'] and Path(steps[-1]['artifact']).is_file()


def first_file(annotations: Annotations) -> str:
    return str(annotations['images'][0]['file_name'])


@pytest.mark.parametrize('content', [b'', b'no image at all', b'cut'])
def test_corrupt_image(content: bytes, train_on: Callable[..., Runner]) -> None:
    def spoil(images: Path, annotations: Annotations) -> None:
        path = images / first_file(annotations)
        path.write_bytes(path.read_bytes()[:60] if content == b'cut' else content)

    with pytest.raises(DataError, match=r'sample \d \(.*train/000000.png\) cannot be read'):
        train_on(spoil)


def test_image_one_pixel_wide(train_on: Callable[..., Runner]) -> None:
    def spoil(images: Path, annotations: Annotations) -> None:
        image = annotations['images'][0]
        Image.fromarray(np.zeros((64, 1, 3), np.uint8)).save(images / image['file_name'])
        image['width'] = 1

    assert ended_in_four_bits(train_on(spoil))


def test_images_without_boxes(train_on: Callable[..., Runner]) -> None:
    def spoil(images: Path, annotations: Annotations) -> None:
        annotations['annotations'] = []

    assert ended_in_four_bits(train_on(spoil))


def test_boxes_outside(train_on: Callable[..., Runner]) -> None:
    def spoil(images: Path, annotations: Annotations) -> None:
        for number, annotation in enumerate(annotations['annotations']):
            annotation['bbox'] = [[500, 500, 20, 20], [-30, -30, 10, 10], [5, 5, 0, 0], [60, 60, 400, 400]][number % 4]

    assert ended_in_four_bits(train_on(spoil))


def test_class_without_samples(train_on: Callable[..., Runner]) -> None:
    def spoil(images: Path, annotations: Annotations) -> None:
        first = annotations['categories'][0]['id']
        annotations['annotations'] = [a for a in annotations['annotations'] if a['category_id'] != first]

    assert ended_in_four_bits(train_on(spoil))


def test_data_set_of_one_image(train_on: Callable[..., Runner]) -> None:
    def spoil(images: Path, annotations: Annotations) -> None:
        annotations['images'] = annotations['images'][:1]

    assert ended_in_four_bits(train_on(spoil))


def test_grey_and_transparent_images(train_on: Callable[..., Runner]) -> None:
    def spoil(images: Path, annotations: Annotations) -> None:
        for mode, image in zip(('L', 'RGBA', 'P', 'LA'), annotations['images'], strict=True):
            path = images / image['file_name']
            Image.open(path).convert('L').convert(mode).save(path)

    assert ended_in_four_bits(train_on(spoil))
