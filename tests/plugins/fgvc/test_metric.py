"""Accuracies counted by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gplq.errors import DataError, RecipeError, WriteError
from gplq.plugins.fgvc import ClassificationMetric

# Three classes; what is found, in order of score, and the label. Right: 1 of 3 of class 0, 1 of 1 of class 2.
SAMPLES = [([0, 1, 2], 0), ([1, 0, 2], 0), ([1, 2, 0], 0), ([2, 0, 1], 2)]


def samples() -> list[dict[str, object]]:
    scores = [torch.zeros(3).index_put((torch.tensor(order),), torch.tensor([0.6, 0.3, 0.1])) for order, _ in SAMPLES]
    return [
        {'scores': score, 'label': label, 'img_path': f'{number}.jpg'}
        for number, (score, (_, label)) in enumerate(zip(scores, SAMPLES, strict=True))
    ]


def test_accuracies_in_percent_over_images_and_over_classes(tmp_path: Path) -> None:
    metric = ClassificationMetric(topk=(1, 2, 5), outfile=str(tmp_path / 'found' / 'test.json'))
    metric.process(None, samples())
    assert metric.evaluate(4) == pytest.approx(
        {'top1': 50.0, 'top2': 75.0, 'top5': 100.0, 'mean_class': 100 * (1 / 3 + 1) / 2}
    )
    found = json.loads((tmp_path / 'found' / 'test.json').read_text())
    assert found['1.jpg'] == {'found': 1, 'label': 0} and found['3.jpg'] == {'found': 2, 'label': 2}


@pytest.mark.parametrize('topk', [[], [0], [-1], [1.5], [True], ['1']])
def test_numbers_of_guesses_that_cannot_be(topk: list[object]) -> None:
    with pytest.raises(RecipeError, match=r'topk=\[.*\] must be a list of numbers of at least 1'):
        ClassificationMetric(topk=topk)


@pytest.mark.parametrize(
    ('settings', 'told'),
    [
        (dict(topk=5), 'topk must be a Sequence, got 5'),
        (dict(confused='x'), "confused must be an integer, got 'x'"),
        (dict(confused=-1), 'confused=-1 must be at least 0'),
        (dict(prefix=1), 'prefix must be a string or None, got 1'),
    ],
)
def test_settings_of_the_metric_are_read_before_a_validation(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        ClassificationMetric(**settings)


def test_no_images_have_no_accuracy() -> None:
    with pytest.raises(DataError, match='no image was evaluated'):
        ClassificationMetric().compute_metrics([])


def test_figures_are_those_that_are_computed() -> None:
    config = dict(type='gplq.plugins.fgvc.ClassificationMetric', topk=[1, 2], prefix='birds')
    metric = ClassificationMetric(topk=(1, 2), prefix='birds')
    metric.process(None, samples())
    assert ClassificationMetric.figures(config) == list(metric.evaluate(4))


def test_a_file_that_cannot_be_written_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / 'file').touch()
    for name, told in (('.', 'is a folder'), ('file/x.json', 'x.json cannot be written')):
        with pytest.raises(WriteError, match=told):
            ClassificationMetric(outfile=str(tmp_path / name))


def test_nan_is_no_guess() -> None:
    sample = {'scores': torch.tensor([0.5, torch.nan, 0.5]), 'label': 0, 'img_path': 'crow.jpg'}
    with pytest.raises(DataError, match='scores of crow.jpg are NaN or infinite'):
        ClassificationMetric().process(None, [sample])


def test_confused_pairs_are_told_by_name(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    metric = ClassificationMetric(topk=(1,))
    metric.dataset_meta = {'classes': ('crow', 'raven', 'rook')}
    metric.process(None, samples())
    told: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('gplq.plugins.fgvc.metric.print_log', lambda text, logger: told.append(text))
        metric.evaluate(4)
    assert told == ['most often confused: crow as raven (2)']
