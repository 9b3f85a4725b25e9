"""Top-1 of two classifiers on resampled images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gplq.plugins.bootstrap import compare_top1
from gplq.plugins.results import ResultError


def write(path: Path, right: list[bool], name: str = 'image') -> Path:
    found = {f'{name}{i}': {'found': int(r), 'label': 1} for i, r in enumerate(right)}
    path.write_text(json.dumps(found))
    return path


def test_the_interval_of_a_difference(tmp_path: Path) -> None:
    """100 images, 50 right against 60: ten that differ, of variance .1 - .01 an image, so 1.96 * 3 points."""
    first = write(tmp_path / 'a', [i < 50 for i in range(100)])
    second = write(tmp_path / 'b', [i < 60 for i in range(100)])
    result = compare_top1(first, second, samples=4000)
    assert (result.first, result.second, result.difference) == (50.0, 60.0, 10.0)
    assert result.low == pytest.approx(10 - 5.88, abs=1.0) and result.high == pytest.approx(10 + 5.88, abs=1.0)
    assert compare_top1(first, second, samples=4000) == result
    itself = compare_top1(first, first)
    assert (itself.low, itself.difference, itself.high) == (0, 0, 0)


def test_order_in_the_files_is_of_no_account(tmp_path: Path) -> None:
    first = write(tmp_path / 'a', [True, False, False])
    content = json.loads(first.read_text())
    second = tmp_path / 'b'
    second.write_text(json.dumps(dict(reversed(content.items()))))
    assert compare_top1(first, second).high == 0


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        ('[{"image_id": 1}]', 'does not hold predictions of classes'),
        ('{}', 'does not hold predictions of classes'),
        ('{"a": {"found": 1}}', 'does not hold predictions of classes'),
        ('{"a": ', 'is no JSON'),
        (None, 'cannot be read: No such file'),
    ],
)
def test_other_files_are_refused(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / 'b').write_text(content)
    with pytest.raises(ResultError, match=message):
        compare_top1(write(tmp_path / 'a', [True]), tmp_path / 'b')


def test_other_images_and_too_few_samples_are_refused(tmp_path: Path) -> None:
    first = write(tmp_path / 'a', [True, False])
    with pytest.raises(ResultError, match='4 are in one alone'):
        compare_top1(first, write(tmp_path / 'b', [True, False], name='other'))
    with pytest.raises(ResultError, match='--samples 1'):
        compare_top1(first, first, samples=1)
