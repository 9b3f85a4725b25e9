"""Paired bootstrap over images: is one model's figure higher than another's by more than chance?"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gplq.plugins.json_files import read_json
from gplq.plugins.results import ResultError

__all__ = ['Difference', 'compare_top1', 'paired_bootstrap', 'top1_of']

# The figure of a set of images that holds image i counts[i] times, (images,) -> a number or nan.
Figure = Callable[[NDArray[np.int64]], float]


@dataclass(frozen=True)
class Difference:
    """The figures of both models, second minus first, and the interval of 95 % of the resampled differences."""

    first: float
    second: float
    difference: float
    low: float
    high: float
    samples: int


def paired_bootstrap(
    images: int,
    first: Figure,
    second: Figure,
    samples: int = 1000,
    seed: int = 0,
    progress: Callable[[range], Iterable[int]] = iter,
) -> Difference:
    """Resample images with replacement, the same for both models.

    Raises:
        ResultError: fewer than two samples.
    """
    if samples < 2:
        raise ResultError(f'--samples {samples} give no interval; 1000 is usual')
    if seed < 0:
        raise ResultError(f'--seed {seed} must be at least 0')
    rng = np.random.default_rng(seed)
    differences = []
    for _ in progress(range(samples)):
        counts = np.bincount(rng.integers(images, size=images), minlength=images)
        differences.append(second(counts) - first(counts))
    once = np.ones(images, dtype=np.int64)
    figures = first(once), second(once)
    low, high = np.nanpercentile(differences, [2.5, 97.5])
    return Difference(*figures, figures[1] - figures[0], float(low), float(high), samples)


def compare_top1(
    first: str | os.PathLike[str],
    second: str | os.PathLike[str],
    samples: int = 1000,
    seed: int = 0,
    progress: Callable[[range], Iterable[int]] = iter,
) -> Difference:
    """Compare two classifiers' top-1, in percent, by the files that `ClassificationMetric` writes with `outfile`.

    Raises:
        ResultError: a file is missing or no such file, or the two are of other images.
    """
    one, two = (_right_of(path) for path in (first, second))
    if set(one) != set(two):
        raise ResultError(f'{first} and {second} are of other images: {len(set(one) ^ set(two))} are in one alone')
    right = [np.array([of[name] for name in sorted(one)], dtype=np.float64) for of in (one, two)]

    def top1(values: NDArray[np.float64]) -> Figure:
        return lambda counts: float(100 * (values @ counts) / counts.sum())

    return paired_bootstrap(len(one), top1(right[0]), top1(right[1]), samples, seed, progress)


def top1_of(path: str | os.PathLike[str]) -> float:
    """Top-1 in percent, by such a file.

    Raises:
        ResultError: it is missing or no such file.
    """
    right = list(_right_of(path).values())
    return 100 * sum(right) / len(right)


def _right_of(path: str | os.PathLike[str]) -> dict[str, bool]:
    """Whether each image was recognized."""
    found = read_json(path)
    fits = isinstance(found, dict) and all(isinstance(v, dict) and {'found', 'label'} <= set(v) for v in found.values())
    if not fits or not found:
        raise ResultError(
            f'{os.fspath(path)} does not hold predictions of classes by image: name what val_evaluator.outfile wrote, '
            'or give --annotations for detectors'
        )
    return {name: bool(value['found'] == value['label']) for name, value in found.items()}
