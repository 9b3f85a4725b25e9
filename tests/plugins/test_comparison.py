"""A run's difference from FP32 as rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from gplq.plugins.benchmark import Run, rows_of
from gplq.plugins.comparison import Comparison, add_intervals, has_interval
from gplq.plugins.results import ResultError, ResultRow, append_row, read_rows


def classifier_rows(run: Run, right: int, images: int = 10) -> list[ResultRow]:
    """Rows of a finished run that recognizes the first images."""
    run.work_dir.mkdir(parents=True)
    shared = dict(
        metrics={'top1': 100 * right / images}, minutes=1.0, peak_memory_mb=7.0, model_bytes=100, scope='backbone'
    )
    steps = [dict(step=name, effective_bits=float(bits), **shared) for name, bits, _ in run.bits_of_rows]
    (run.work_dir / 'gplq.json').write_text(json.dumps(steps))
    found = {f'{i}.jpg': {'found': 'cat' if i < right else 'dog', 'label': 'cat'} for i in range(images)}
    (run.work_dir / 'predictions.json').write_text(json.dumps(found))
    return rows_of(run, ['top1'], 'vit')


def test_the_interval_of_a_difference_from_fp32_becomes_two_rows(make_runs: Callable[..., list[Run]]) -> None:
    fp32, run = make_runs(['fp32', 'gplq'], [3], [0], [''], task='classification')
    pair = Comparison(run, fp32, 'top1')
    assert pair.missing == pair.files
    with pytest.raises(ResultError, match='fp32_w32_s0/predictions.json is missing: no predictions for top1'):
        pair.measure('')
    (known,) = classifier_rows(fp32, right=5)
    *_, row = classifier_rows(run, right=4)
    low, high = pair.rows(pair.measure(''), known, row)
    assert (low.metric, high.metric) == ('top1_low', 'top1_high')
    assert low.command == f'python tools/bootstrap.py {fp32.work_dir}/predictions.json {run.work_dir}/predictions.json'
    # One image of ten is lost, the fifth: how often it is drawn in ten draws is binomial.
    assert (low.value, high.value) == (-30.0, 0.0)
    assert (low.weight_bits, low.seed, low.method, low.variant) == (3, 0, 'gplq', '')
    with pytest.raises(ResultError, match='its predictions give top1 40.0000, its row has 50.0000'):
        pair.rows(pair.measure(''), known, replace(row, value=50.0))
    with pytest.raises(ResultError, match='fp32_w32_s0: its predictions give top1 50.0000, its row has 60.0000'):
        pair.rows(pair.measure(''), replace(known, value=60.0), row)


def test_an_interval_counts_if_both_bounds_stand_behind_both_figures(make_runs: Callable[..., list[Run]]) -> None:
    fp32, run = make_runs(['fp32', 'gplq'], [3], [0], [''], task='classification')
    pair = Comparison(run, fp32, 'top1')
    (known,) = classifier_rows(fp32, right=5)
    between, row = classifier_rows(run, right=4)
    low, high = pair.rows(pair.measure(''), known, row)

    def counts(*rows: ResultRow) -> bool:
        return has_interval(rows, 'top1', (fp32.text, run.text), pair.text)

    assert counts(known, between, row, low, high)
    assert not counts(known, between, row)
    assert not counts(known, between, row, low)
    assert not counts(known, between, row, low, high, known)
    assert not counts(known, between, low, high, row)
    assert not counts(known, low, row, high)
    assert counts(known, low, high, row, low, high)
    # Another metric's figure changes nothing.
    assert counts(known, row, low, high, replace(row, metric='mean_class'))


def test_intervals_are_added_once_and_of_predictions_that_are_there(
    make_runs: Callable[..., list[Run]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fp32, gplq, rtn = make_runs(['fp32', 'gplq', 'rtn'], [3], [0], [''], task='classification')
    output = tmp_path / 'rows.jsonl'
    for row in [*classifier_rows(fp32, right=5), *classifier_rows(gplq, right=4), *classifier_rows(rtn, right=2)]:
        append_row(output, row)
    (rtn.work_dir / 'predictions.json').unlink()
    pairs = [Comparison(run, fp32, 'top1') for run in (gplq, rtn)]
    sha256 = read_rows(output)[0].checkpoint_sha256
    for _ in range(2):
        add_intervals(pairs, '', sha256, output)
    # Activations alone and all of GPLQ have a figure; the predictions are the latter's.
    low, high = read_rows(output)[4:]
    assert (low.metric, high.metric, low.weight_bits, low.method) == ('top1_low', 'top1_high', 3, 'gplq')
    assert f'no interval of top1: {rtn.work_dir}/predictions.json is gone' in capsys.readouterr().out


def test_a_detector_is_compared_by_boxes_or_masks_and_the_truth_of_its_split(
    make_runs: Callable[..., list[Run]],
) -> None:
    fp32, run = make_runs(['fp32', 'rtn'], [3], [0])
    for of in (fp32, run):
        of.work_dir.mkdir(parents=True)
        (of.work_dir / 'predictions.segm.json').write_text('[]')
    pair = Comparison(run, fp32, 'segm_mAP')
    assert not pair.missing
    assert [file.name for file in Comparison(run, fp32, 'bbox_mAP').missing] == ['predictions.bbox.json'] * 2
    assert not Comparison.compares('bbox_mAP_50')
    assert pair.text.endswith('predictions.segm.json --annotations ${GPLQ_DATA_ROOT}/dev.json --iou-type segm')
