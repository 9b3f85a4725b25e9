"""Accuracy of a classifier, and what it confuses."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, get_type_hints

import torch
from mmengine.evaluator import BaseMetric
from mmengine.logging import print_log

from gplq.errors import DataError, RecipeError
from gplq.files import check_writable, write_bytes_atomically
from gplq.typecheck import check_types

__all__ = ['ClassificationMetric']


class ClassificationMetric(BaseMetric):
    """Top-k accuracy, mean accuracy of the classes, in percent; the pairs that are confused most often are logged.

    Args:
        topk: `top1`, `top5`, …; no more than there are classes.
        confused: how many pairs (true class, class found) are logged.
        outfile: a JSON file for what was found in each image, by its path: class, label and whether they agree.

    Raises:
        RecipeError: `topk` holds no numbers, `confused` is below 0, or a setting is of the wrong type.
        WriteError: `outfile` cannot be written.
    """

    def __init__(
        self,
        topk: Sequence[int] = (1, 5),
        confused: int = 5,
        outfile: str | None = None,
        collect_device: str = 'cpu',
        prefix: str | None = None,
    ) -> None:
        settings = dict(topk=topk, confused=confused, outfile=outfile, collect_device=collect_device, prefix=prefix)
        check_types(settings, get_type_hints(ClassificationMetric.__init__), 'ClassificationMetric: ')
        if confused < 0:
            raise RecipeError(f'ClassificationMetric: confused={confused} must be at least 0')
        if not topk or not all(isinstance(k, int) and not isinstance(k, bool) and k > 0 for k in topk):
            raise RecipeError(f'ClassificationMetric: topk={topk!r} must be a list of numbers of at least 1, such as 1')
        if outfile is not None:
            check_writable(outfile)
        super().__init__(collect_device=collect_device, prefix=prefix)
        self.topk = tuple(topk)
        self.confused = confused
        self.outfile = outfile

    @staticmethod
    def figures(config: Mapping[str, Any]) -> list[str]:
        """What the metric of a config will give, by name."""
        metric = ClassificationMetric(**{name: value for name, value in config.items() if name != 'type'})
        prefix = f'{metric.prefix}/' if metric.prefix else ''
        return [prefix + name for name in (*(f'top{k}' for k in metric.topk), 'mean_class')]

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, Any]]) -> None:
        """Keep the best classes of each image."""
        for sample in data_samples:
            if not bool(sample['scores'].isfinite().all()):
                raise DataError(
                    f'scores of {sample.get("img_path") or "an image"} are NaN or infinite and no guess: check the '
                    "model's weights, and the image"
                )
            count = min(max(self.topk), len(sample['scores']))
            best = sample['scores'].topk(count).indices.tolist()
            self.results.append((best, sample['label'], sample.get('img_path', '')))

    def compute_metrics(self, results: list[tuple[list[int], int, str]]) -> dict[str, float]:
        """Percentages over all images, and over classes that have any."""
        if not results:
            raise DataError('ClassificationMetric: no image was evaluated; give data with images')
        labels = torch.tensor([label for _, label, _ in results])
        right = torch.tensor([best[0] == label for best, label, _ in results], dtype=torch.float64)
        metrics = {
            f'top{k}': 100 * sum(label in best[:k] for best, label, _ in results) / len(results) for k in self.topk
        }
        per_class = [float(right[labels == label].mean()) for label in labels.unique()]
        metrics['mean_class'] = 100 * sum(per_class) / len(per_class)
        self._tell_confused(results)
        if self.outfile is not None:
            found = {path: {'found': best[0], 'label': label} for best, label, path in results}
            write_bytes_atomically(self.outfile, json.dumps(found).encode())
        return metrics

    def _tell_confused(self, results: list[tuple[list[int], int, str]]) -> None:
        classes = (self.dataset_meta or {}).get('classes')
        pairs = Counter((label, best[0]) for best, label, _ in results if best[0] != label)
        told = [
            f'{classes[label] if classes else label} as {classes[found] if classes else found} ({count})'
            for (label, found), count in pairs.most_common(self.confused)
        ]
        if told:
            print_log(f'most often confused: {", ".join(told)}', logger='current')
