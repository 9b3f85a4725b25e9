from __future__ import annotations

import contextlib
import io
import json

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from gplq.plugins.detection.bootstrap import compare_detectors, match_images
from gplq.plugins.detection.shapes import CLASSES, ShapesSettings, write_split
from gplq.plugins.results import ResultError


def make_truth(boxes: dict[int, list[list[float]]], images: int, category: int = 1) -> COCO:
    truth = COCO()
    flat = [(image, box) for image, of_image in boxes.items() for box in of_image]
    truth.dataset = dict(
        info={},
        images=[dict(id=i, width=100, height=100, file_name=f'{i}.png') for i in range(1, images + 1)],
        categories=[dict(id=category, name='thing')],
        annotations=[
            dict(id=n, image_id=image, category_id=category, bbox=box, area=box[2] * box[3], iscrowd=0)
            for n, (image, box) in enumerate(flat, start=1)
        ],
    )
    truth.createIndex()
    return truth


def prediction(image: int, box: list[float], score: float, category: int = 1) -> dict:
    return dict(image_id=image, category_id=category, bbox=box, score=score)


def coco_ap(truth: COCO, results: list[dict]) -> float:
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(truth, truth.loadRes(results), 'bbox')
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return float(evaluation.stats[0])


BOX = [10.0, 10.0, 20.0, 20.0]


def test_half_of_the_objects_found() -> None:
    """One of two objects is found: recalls 0, .01, … .5 have precision 1, the others 0."""
    truth = make_truth({1: [BOX], 2: [BOX]}, images=2)
    matched = match_images(truth, [prediction(1, BOX, 0.9)])
    assert matched.average_precision(np.array([1, 1])) == pytest.approx(51 / 101)
    assert matched.average_precision(np.array([2, 0])) == 1
    assert matched.average_precision(np.array([0, 2])) == 0
    assert matched.average_precision(np.array([1, 3])) == pytest.approx(26 / 101)


def test_a_better_scored_mistake_halves_precision() -> None:
    truth = make_truth({1: [BOX]}, images=2)
    matched = match_images(truth, [prediction(1, BOX, 0.5), prediction(2, BOX, 0.9)])
    assert matched.average_precision(np.array([1, 1])) == pytest.approx(1 / 2)
    assert matched.average_precision(np.array([1, 0])) == 1
    assert matched.average_precision(np.array([1, 3])) == pytest.approx(1 / 4)
    assert np.isnan(matched.average_precision(np.array([0, 2])))


def test_nothing_detected() -> None:
    truth = make_truth({1: [BOX]}, images=1)
    assert match_images(truth, []).average_precision(np.array([1])) == 0


@pytest.fixture
def noisy_detections(tmp_path):
    """Generated truth, and a maker of detections that are shifted, missed, confused or made up."""
    path = write_split(tmp_path, 'val', 12, ShapesSettings(size=96))
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(path))

    def make(noise: float, seed: int) -> list[dict]:
        rng = np.random.default_rng(seed)
        results = []
        for a in truth.dataset['annotations']:
            box = (np.array(a['bbox']) + rng.normal(0, noise, 4)).tolist()
            category = int(rng.integers(1, len(CLASSES) + 1)) if rng.random() < 0.1 else a['category_id']
            if rng.random() < 0.9:
                # Scores of one decimal tie often, within and between images.
                results.append(prediction(a['image_id'], box, round(rng.random(), 1), category))
            if rng.random() < 0.3:
                made_up = [*rng.uniform(0, 60, 2), 20.0, 20.0]
                results.append(prediction(a['image_id'], made_up, round(rng.random(), 1), a['category_id']))
        return results

    return path, truth, make


def test_counts_of_one_give_what_cocoeval_gives(noisy_detections) -> None:
    _, truth, make = noisy_detections
    for seed in range(5):
        results = make(2.0, seed)
        ap = match_images(truth, results).average_precision(np.ones(12, dtype=np.int64))
        assert 0.1 < ap < 0.9
        assert ap == pytest.approx(coco_ap(truth, results), abs=1e-9)


def test_counts_give_what_cocoeval_gives_on_repeated_images(noisy_detections) -> None:
    _, truth, make = noisy_detections
    results = make(2.0, 0)
    counts = np.random.default_rng(1).integers(0, 4, size=12)
    repeated, repeated_results = COCO(), []
    data: dict = dict(info={}, images=[], annotations=[], categories=truth.dataset['categories'])
    for image, count in zip(truth.getImgIds(), counts, strict=True):
        for _ in range(count):
            new = len(data['images']) + 1
            data['images'].append(dict(truth.imgs[image], id=new))
            for a in truth.imgToAnns[image]:
                data['annotations'].append(dict(a, id=len(data['annotations']) + 1, image_id=new))
            repeated_results += [dict(r, image_id=new) for r in results if r['image_id'] == image]
    repeated.dataset = data
    repeated.createIndex()
    expected = coco_ap(repeated, repeated_results)
    assert match_images(truth, results).average_precision(counts) == pytest.approx(expected, abs=1e-9)


def test_interval_separates_a_good_from_a_bad_detector_only(noisy_detections, tmp_path) -> None:
    path, _, make = noisy_detections
    for name, noise, seed in (('good', 0.5, 0), ('same', 0.5, 1), ('bad', 4.0, 2)):
        (tmp_path / f'{name}.json').write_text(json.dumps(make(noise, seed)))

    def compare(first: str, second: str):
        return compare_detectors(path, tmp_path / f'{first}.json', tmp_path / f'{second}.json', samples=200)

    worse = compare('good', 'bad')
    assert worse.high < 0
    assert worse.low < worse.difference < worse.high
    assert worse.difference == worse.second - worse.first
    equal = compare('good', 'same')
    assert equal.low < 0 < equal.high
    itself = compare('good', 'good')
    assert (itself.low, itself.difference, itself.high) == (0, 0, 0)
    assert compare('good', 'bad') == worse


def test_refuses_what_it_cannot_compare(tmp_path) -> None:
    truth = make_truth({1: [BOX]}, images=1)
    with pytest.raises(ValueError, match='such as id 7'):
        match_images(truth, [prediction(7, BOX, 0.5)])
    with pytest.raises(ValueError, match="iou_type 'mask'"):
        match_images(truth, [], 'mask')
    annotations, results = tmp_path / 'truth.json', tmp_path / 'results.json'
    annotations.write_text(json.dumps(truth.dataset))
    results.write_text('{}')
    with pytest.raises(ValueError, match='results.json is no list'):
        compare_detectors(annotations, results, results)
    results.write_text('[]')
    with pytest.raises(ValueError, match='--samples 1 '):
        compare_detectors(annotations, results, results, samples=1)


@pytest.mark.parametrize(
    ('results', 'iou_type', 'message'),
    [
        ([1], 'bbox', 'is no list of predictions with bbox, category_id, image_id, score; give PREFIX.bbox.json'),
        ([dict(image_id=1, category_id=1, bbox=BOX)], 'bbox', 'is no list of predictions'),
        ([dict(image_id=1, category_id=1, bbox=BOX, score=0.5)], 'segm', 'segmentation; give PREFIX.segm.json'),
    ],
)
def test_predictions_of_another_kind(results: list, iou_type: str, message: str, tmp_path) -> None:
    annotations, path = tmp_path / 'val.json', tmp_path / 'results.json'
    annotations.write_text(json.dumps(make_truth({1: [BOX]}, images=1).dataset))
    path.write_text(json.dumps(results))
    with pytest.raises(ResultError, match=message):
        compare_detectors(annotations, path, path, iou_type)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(images=None), "no annotations in COCO's format"),
        (dict(images=[]), "no annotations in COCO's format"),
        (dict(annotations=[dict(id=1)]), 'one of its annotations has no area'),
    ],
)
def test_annotations_of_another_kind(change: dict, message: str, tmp_path) -> None:
    annotations, path = tmp_path / 'val.json', tmp_path / 'results.json'
    annotations.write_text(json.dumps(make_truth({1: [BOX]}, images=1).dataset | change))
    path.write_text('[]')
    with pytest.raises(ResultError, match=message):
        compare_detectors(annotations, path, path)
