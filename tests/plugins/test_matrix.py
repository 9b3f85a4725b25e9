"""Table, CSV, plot and settings of a comparison."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import pytest
from mmengine.config import Config

from gplq.plugins.benchmark import Run, rows_of
from gplq.plugins.matrix import plot, rows_of_runs, settings_of, write_csv
from gplq.plugins.results import ResultError, ResultRow

Rows = Callable[..., list[ResultRow]]


@pytest.fixture
def rows(make_runs: Callable[..., list[Run]]) -> Rows:
    def make(runs: list[Run]) -> list[ResultRow]:
        found = []
        for number, run in enumerate(runs):
            run.work_dir.mkdir(parents=True, exist_ok=True)
            note = dict(effective_bits=4.0, model_bytes=9, peak_memory_mb=7.0, scope='backbone', minutes=1.0)
            steps = [dict(note, step=step, metrics={'top1': 40.0 + number}) for step, *_ in run.bits_of_rows]
            (run.work_dir / 'gplq.json').write_text(json.dumps(steps))
            found += rows_of(run, ['top1'], 'vit')
        return found

    return make


def test_rows_are_those_of_the_runs_and_the_last_of_each(make_runs: Callable[..., list[Run]], rows: Rows) -> None:
    runs = make_runs(['fp32', 'rtn', 'gplq'], [4], [0], [''])
    found = rows(runs)
    sha256 = found[0].checkpoint_sha256
    foreign = [
        replace(found[1], method='gptq'),
        replace(found[1], weight_bits=3),
        replace(found[1], seed=5),
        replace(found[1], variant='folded'),
        replace(found[1], checkpoint_sha256=64 * '0'),
    ]
    again = replace(found[1], value=77.0)
    interval = replace(found[1], metric='top1_low', value=-1.0, command='python tools/bootstrap.py')
    mine = rows_of_runs(runs, [*found, *foreign, again, interval], sha256)
    assert mine == [found[0], again, *found[2:], interval]
    # Measured anew, a figure has no interval until that is too.
    later = replace(again, value=78.0)
    assert rows_of_runs(runs, [*found, interval, later], sha256) == [found[0], later, *found[2:]]


def test_csv_has_a_line_a_step_with_its_interval_and_cost(make_runs: Callable[..., list[Run]], rows: Rows) -> None:
    found = rows(make_runs(['rtn', 'gplq'], [4], [0], ['']))
    found += [replace(found[0], metric='top1_low', value=-1.5), replace(found[0], metric='top1_high', value=0.5)]
    lines = list(csv.DictReader(io.StringIO(write_csv(found, ['top1']))))
    assert [(line['method'], line['weight_bits'], line['top1']) for line in lines] == [
        ('rtn', '4', '40.0'),
        ('gplq', '32', '41.0'),
        ('gplq', '4', '41.0'),
    ]
    assert (lines[0]['top1_low'], lines[0]['top1_high'], lines[1]['top1_low']) == ('-1.5', '0.5', '')
    assert (lines[2]['minutes'], lines[2]['artifact_bytes']) == ('2.0', '9')


def test_plot_is_a_picture(make_runs: Callable[..., list[Run]], rows: Rows, tmp_path: Path) -> None:
    plot(rows(make_runs(['fp32', 'rtn', 'gplq'], [4, 3], [0, 1], [''])), 'top1', tmp_path / 'a.png')
    image = cv2.imread(str(tmp_path / 'a.png'))
    assert image.shape[1] > image.shape[0] > 300
    assert (image < 255).any()


def test_settings_are_where_a_method_differs() -> None:
    hook = {'type': 'gplq.plugins.GPLQHook', 'weight_bits': 4, 'mimicking': 2.0}
    cfg = Config({'default_hooks': {'gplq': hook}})
    rtn = {'linear_input': 'tensor', 'input_offset': False, 'attention_map': 'uniform', 'equalize': False}
    assert settings_of(cfg, 'a.py', 'gptq', {}) == {**rtn, 'rounding': 'feedback'}
    assert settings_of(cfg, 'a.py', 'rtn', {})['rounding'] == 'nearest'
    ours = settings_of(cfg, 'a.py', 'gplq', {'default_hooks.gplq.recipe.clips': '[1.0]', 'x': 'text'})
    assert (ours['clips'], ours['stage.mimicking_weight']) == ((1.0,), 2.0)
    assert settings_of(cfg, 'a.py', 'ptq4vit', {})['search.metric'] == 'hessian'
    assert settings_of(cfg, 'a.py', 'reconstruct', {})['reconstruction.iterations'] == 500
    with pytest.raises(ResultError, match='write such a setting as dict'):
        settings_of(cfg, 'a.py', 'gplq', {'default_hooks.gplq': '5'})
