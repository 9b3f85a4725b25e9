"""AP of resampled images, from matches that are found once."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from gplq.plugins.bootstrap import Difference, paired_bootstrap
from gplq.plugins.json_files import read_json
from gplq.plugins.results import ResultError

__all__ = ['MatchedImages', 'compare_detectors', 'match_images']


@dataclass(frozen=True)
class _Category:
    """Detections of a category in all images, by falling score: their image; right or wrong by threshold."""

    image: NDArray[np.int64]  # (D,)
    correct: NDArray[np.bool_]  # (T, D)
    wrong: NDArray[np.bool_]  # (T, D); neither where the detection is ignored
    objects: NDArray[np.int64]  # (images,) to be found


@dataclass(frozen=True)
class MatchedImages:
    """A detector's boxes or masks, matched to the truth image by image, which resampling leaves as it is."""

    images: int
    categories: tuple[_Category, ...]
    recalls: NDArray[np.float64]

    def average_precision(self, counts: NDArray[np.int64]) -> float:
        """COCO's AP of a set that holds image i `counts[i]` times, (images,) -> a fraction, or nan."""
        precisions = [p for c in self.categories if (p := self._precision(c, counts)) is not None]
        return float(np.mean(precisions)) if precisions else float('nan')

    def _precision(self, category: _Category, counts: NDArray[np.int64]) -> float | None:
        objects = int(category.objects @ counts)
        if not objects:
            return None
        times = counts[category.image]
        # A copy of an image matches as the image does, so counting its detections several times repeats them.
        found = np.cumsum(category.correct * times, axis=1)
        precision = found / np.maximum(found + np.cumsum(category.wrong * times, axis=1), 1)
        envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        at = [np.searchsorted(recall, self.recalls, side='left') for recall in found / objects]
        padded = np.pad(envelope, ((0, 0), (0, 1)))
        return float(np.mean([row[indices] for row, indices in zip(padded, at, strict=True)]))


def match_images(truth: COCO, results: list[dict[str, Any]], iou_type: str = 'bbox') -> MatchedImages:
    """Match detections, as COCO's result format lists them, to the annotated objects.

    Raises:
        ResultError: `iou_type` is neither bbox nor segm, or a detection lies in an image without record.
    """
    if iou_type not in ('bbox', 'segm'):
        raise ResultError(f"no iou_type {iou_type!r}; 'bbox' or 'segm'")
    if foreign := {r['image_id'] for r in results} - set(truth.getImgIds()):
        raise ResultError(f'predictions for images that are not annotated, such as id {min(foreign)}')
    with contextlib.redirect_stdout(io.StringIO()):
        # loadRes takes no empty list.
        detections = truth.loadRes(results) if results else COCO()
        evaluation = COCOeval(truth, detections, iou_type)
        evaluation.params.areaRng = evaluation.params.areaRng[:1]
        evaluation.params.areaRngLbl = evaluation.params.areaRngLbl[:1]
        evaluation.params.maxDets = [100]
        evaluation.evaluate()
    images = len(evaluation.params.imgIds)
    per_image = evaluation.evalImgs
    categories = [
        _category(per_image[start : start + images], len(evaluation.params.iouThrs))
        for start in range(0, len(per_image), images)
    ]
    return MatchedImages(images, tuple(categories), evaluation.params.recThrs)


def _category(matches: list[dict[str, Any] | None], thresholds: int) -> _Category:
    known = [(index, match) for index, match in enumerate(matches) if match is not None]
    objects = np.zeros(len(matches), dtype=np.int64)
    for index, match in known:
        objects[index] = np.count_nonzero(np.asarray(match['gtIgnore']) == 0)
    scores = np.concatenate([np.asarray(m['dtScores'], dtype=float) for _, m in known] or [np.empty(0)])
    image = np.concatenate([np.full(len(m['dtScores']), i) for i, m in known] or [np.empty(0)]).astype(np.int64)
    nothing = np.empty((thresholds, 0))
    matched = np.concatenate([m['dtMatches'] for _, m in known] or [nothing], axis=1) > 0
    ignored = np.concatenate([m['dtIgnore'] for _, m in known] or [nothing], axis=1) > 0
    order = np.argsort(-scores, kind='mergesort')
    return _Category(image[order], (matched & ~ignored)[:, order], (~matched & ~ignored)[:, order], objects)


def compare_detectors(
    annotations: str | os.PathLike[str],
    first: str | os.PathLike[str],
    second: str | os.PathLike[str],
    iou_type: str = 'bbox',
    samples: int = 1000,
    seed: int = 0,
    progress: Callable[[range], Iterable[int]] = iter,
) -> Difference:
    """Compare two detectors' AP by the files that mmdet's `CocoMetric` writes with `outfile_prefix`.

    Raises:
        ResultError: a file is missing or no such file, or what `match_images` refuses.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = _truth(annotations)
        truth.createIndex()
    one, two = (match_images(truth, _load(path, iou_type), iou_type) for path in (first, second))
    return paired_bootstrap(one.images, one.average_precision, two.average_precision, samples, seed, progress)


def _truth(path: str | os.PathLike[str]) -> dict[str, Any]:
    content = read_json(path)
    parts = ('images', 'annotations', 'categories')
    fits = isinstance(content, dict) and all(_are_dicts(content.get(part)) for part in parts)
    if not fits or not content['images']:
        raise ResultError(f"{os.fspath(path)} holds no annotations in COCO's format: images, annotations, categories")
    of_object = {'id', 'image_id', 'category_id', 'area', 'iscrowd'}
    needed = {'images': {'id'}, 'categories': {'id'}, 'annotations': of_object}
    for part, names in needed.items():
        if missing := next((names - set(item) for item in content[part] if names - set(item)), None):
            raise ResultError(f'{os.fspath(path)}: one of its {part} has no {min(missing)}')
    return content


def _load(path: str | os.PathLike[str], iou_type: str) -> list[dict[str, Any]]:
    results = read_json(path)
    shape = {'bbox': 'bbox', 'segm': 'segmentation'}.get(iou_type, 'bbox')
    needed = {'image_id', 'category_id', 'score', shape}
    if not _are_dicts(results) or any(needed - set(result) for result in results):
        raise ResultError(
            f'{os.fspath(path)} is no list of predictions with {", ".join(sorted(needed))}; give PREFIX.{iou_type}.json'
        )
    found: list[dict[str, Any]] = results
    return found


def _are_dicts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)
