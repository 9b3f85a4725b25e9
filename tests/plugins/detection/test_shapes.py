from __future__ import annotations

import collections
import json
import zlib

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO

from gplq.plugins.detection.shapes import (
    CLASSES,
    MIN_CONTRAST,
    ShapesSettings,
    _rasterize,
    draw_image,
    is_written,
    write_split,
)

# Checksums of one image and its masks, drawn once; any platform has to draw them again.
GOLDEN = (2295038262, 51580755)


def rectangle(x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
    return np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)]) * 16


def test_rasterize_fills_the_pixels_whose_centers_lie_inside() -> None:
    expected = np.zeros((10, 10), dtype=bool)
    expected[3:8, 2:6] = True
    np.testing.assert_array_equal(_rasterize([rectangle(2, 3, 6, 8)], 10), expected)


def test_rasterize_leaves_holes_and_ignores_orientation() -> None:
    outer, hole = rectangle(1, 1, 9, 9), rectangle(3, 3, 6, 6)
    expected = np.zeros((10, 10), dtype=bool)
    expected[1:9, 1:9] = True
    expected[3:6, 3:6] = False
    np.testing.assert_array_equal(_rasterize([outer, hole], 10), expected)
    np.testing.assert_array_equal(_rasterize([outer[::-1], hole], 10), expected)


def test_rasterize_half_of_a_diagonal() -> None:
    triangle = np.array([(0, 0), (8, 0), (0, 8)]) * 16
    rows, columns = np.indices((8, 8))
    np.testing.assert_array_equal(_rasterize([triangle], 8), rows + columns + 1 < 8)


def test_rasterize_outside_the_image_is_empty() -> None:
    assert not _rasterize([rectangle(-9, -9, -2, -2), rectangle(20, 20, 30, 30)], 10).any()


def test_pixels_are_the_same_everywhere() -> None:
    image, instances = draw_image(ShapesSettings(seed=3), 'val', 5)
    masks = np.stack([i.mask for i in instances])
    assert (zlib.crc32(image.tobytes()), zlib.crc32(masks.tobytes())) == GOLDEN


def test_an_image_depends_on_seed_split_and_index_only() -> None:
    settings = ShapesSettings()
    first = draw_image(settings, 'train', 1)[0]
    draw_image(settings, 'train', 0)
    np.testing.assert_array_equal(draw_image(settings, 'train', 1)[0], first)
    for other in (
        draw_image(settings, 'val', 1),
        draw_image(settings, 'train', 2),
        draw_image(ShapesSettings(seed=1), 'train', 1),
    ):
        assert (other[0] != first).mean() > 0.5


def test_visible_masks_are_disjoint_and_objects_do_overlap() -> None:
    settings = ShapesSettings(min_objects=8, max_objects=8)
    hidden = 0
    for index in range(10):
        image, instances = draw_image(settings, 'train', index)
        assert image.shape == (128, 128, 3) and image.dtype == np.uint8
        assert sum(i.mask.astype(int) for i in instances).max() == 1
        assert all(i.mask.any() for i in instances)
        # A mask in several pieces has been crossed by a later shape.
        hidden += sum(cv2.connectedComponents(i.mask.astype(np.uint8))[0] > 2 for i in instances)
    assert hidden > 0


def test_pixels_of_a_mask_differ_from_the_background() -> None:
    settings = ShapesSettings(min_objects=1, max_objects=1)
    for index in range(5):
        image, (instance,) = draw_image(settings, 'val', index)
        inside, outside = image[instance.mask].astype(float), image[~instance.mask].astype(float)
        # Textures of +-24, +-12 and +-6 vary about the colors, clipping brings them closer.
        assert np.abs(np.median(inside, 0) - np.median(outside, 0)).sum() > MIN_CONTRAST / 3


def test_all_classes_appear_about_equally_often() -> None:
    settings = ShapesSettings()
    count = collections.Counter(i.label for n in range(120) for i in draw_image(settings, 'train', n)[1])
    assert set(count) == set(range(len(CLASSES)))
    assert min(count.values()) > 0.6 * max(count.values())


def test_written_annotations_agree_with_the_drawing(tmp_path) -> None:
    settings = ShapesSettings(size=96, seed=7)
    path = write_split(tmp_path, 'val', 4, settings)
    coco = COCO(str(path))
    assert [c['name'] for c in coco.loadCats(coco.getCatIds())] == list(CLASSES)
    for index, record in enumerate(coco.loadImgs(coco.getImgIds())):
        image, instances = draw_image(settings, 'val', index)
        np.testing.assert_array_equal(cv2.imread(str(tmp_path / 'val' / record['file_name']))[:, :, ::-1], image)
        annotations = coco.loadAnns(coco.getAnnIds(record['id']))
        assert len(annotations) == len(instances)
        for annotation, instance in zip(annotations, instances, strict=True):
            mask = coco.annToMask(annotation).astype(bool)
            np.testing.assert_array_equal(mask, instance.mask)
            assert annotation['category_id'] == instance.label + 1
            assert annotation['area'] == mask.sum()
            rows, columns = np.nonzero(mask)
            width, height = np.ptp(columns) + 1, np.ptp(rows) + 1
            assert annotation['bbox'] == [columns.min(), rows.min(), width, height]


def test_is_written_knows_the_settings(tmp_path) -> None:
    settings = ShapesSettings(size=64, max_radius=16)
    assert not is_written(tmp_path, 'train', 2, settings)
    write_split(tmp_path, 'train', 2, settings)
    assert is_written(tmp_path, 'train', 2, settings)
    assert not is_written(tmp_path, 'train', 3, settings)
    assert not is_written(tmp_path, 'val', 2, settings)
    assert not is_written(tmp_path, 'train', 2, ShapesSettings(size=64, max_radius=16, seed=1))


def test_interrupted_split_is_not_taken_for_a_whole_one(tmp_path) -> None:
    def interrupt(indices: range):
        yield 0
        raise KeyboardInterrupt

    settings = ShapesSettings(size=64, max_radius=16)
    with pytest.raises(KeyboardInterrupt):
        write_split(tmp_path, 'train', 2, settings, progress=interrupt)
    assert not is_written(tmp_path, 'train', 2, settings)


def test_annotations_are_plain_json(tmp_path) -> None:
    path = write_split(tmp_path, 'train', 1, ShapesSettings(size=64, max_radius=16))
    content = json.loads(path.read_text())
    assert isinstance(content['annotations'][0]['segmentation']['counts'], str)
    assert {a['iscrowd'] for a in content['annotations']} == {0}


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        (dict(min_objects=0), '0 to 5 objects'),
        (dict(min_objects=7), '7 to 5 objects'),
        (dict(min_radius=2), '2 to 32 pixels'),
        (dict(size=48), 'do not fit images of 48'),
    ],
)
def test_settings_that_cannot_be_drawn(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        ShapesSettings(**settings)


def test_bad_split_and_count(tmp_path) -> None:
    with pytest.raises(ValueError, match="no split 'dev'"):
        draw_image(ShapesSettings(), 'dev', 0)
    with pytest.raises(ValueError, match='0 images for train'):
        write_split(tmp_path, 'train', 0, ShapesSettings())
