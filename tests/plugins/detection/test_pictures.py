from __future__ import annotations

import numpy as np
from pycocotools import mask as coco_mask

from gplq.plugins.detection.pictures import COLORS, draw_predictions, side_by_side


def test_masks_are_blended_and_boxes_drawn() -> None:
    image = np.full((20, 30, 3), 100, dtype=np.uint8)
    mask = np.zeros((20, 30), dtype=np.uint8)
    mask[12:18, 5:11] = 1
    rle = coco_mask.encode(np.asfortranarray(mask))
    prediction = dict(category_id=2, score=0.9, bbox=[4.0, 11.0, 8.0, 8.0], segmentation=rle)
    picture = draw_predictions(image, [prediction], ('disk', 'ring'), zoom=2)
    assert picture.shape == (40, 60, 3)
    blended = 50 + np.array(COLORS[1]) // 2
    np.testing.assert_array_equal(picture[26:34, 12:20], np.broadcast_to(blended, (8, 8, 3)))
    np.testing.assert_array_equal(picture[38:, 40:], 100)
    np.testing.assert_array_equal(image, 100)
    # The box's left side, away from its corners.
    np.testing.assert_array_equal(picture[30, 8], COLORS[1])


def test_no_predictions_leave_the_image() -> None:
    image = np.arange(27, dtype=np.uint8).reshape(3, 3, 3)
    np.testing.assert_array_equal(draw_predictions(image, [], (), zoom=1), image)


def test_pictures_stand_under_their_titles() -> None:
    one, two = np.zeros((30, 40, 3), dtype=np.uint8), np.full((30, 40, 3), 7, dtype=np.uint8)
    both = side_by_side([one, two], ['FP32', '4 bit'])
    assert both.shape == (50, 80, 3)
    np.testing.assert_array_equal(both[20:], np.concatenate([one, two], axis=1))
    assert (both[:20, :40] < 128).any() and (both[:20, 40:] < 128).any()
