from __future__ import annotations

import pytest

from gplq.plugins.results import ResultError, ResultRow, append_row
from gplq.plugins.tables import fill_tables, render_table


def make_row(method: str, weight_bits: int, activation_bits: int, value: float, seed: int = 0, **changes) -> ResultRow:
    values: dict = dict(
        benchmark='toy',
        split='test',
        model='vit',
        scope='backbone',
        checkpoint_sha256='0' * 64,
        effective_bits=4.2,
        metric='bbox_mAP',
        minutes=2.0,
        peak_memory_mb=None,
        artifact_bytes=1_500_000,
        command='python tools/train.py',
        commit='abc',
        versions=dict(torch='2.12.1'),
    )
    values.update(changes)
    return ResultRow(
        method=method,
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        value=value,
        seed=seed,
        **values,
    )


def test_mean_and_spread_over_seeds_in_reading_order() -> None:
    rows = [
        make_row('gplq', 4, 4, 0.50, seed=0),
        make_row('gplq', 4, 4, 0.54, seed=1),
        make_row('rtn', 4, 4, 0.40),
        make_row('gplq', 3, 3, 0.45),
        make_row('gplq', 32, 4, 0.53),
        make_row('fp32_control', 32, 32, 0.56),
        make_row('fp32', 32, 32, 0.55),
    ]
    assert render_table(rows, ['bbox_mAP'], ['minutes', 'artifact_bytes', 'peak_memory_mb']) == (
        '| method | bits | bbox mAP | minutes | artifact, MB | peak memory, MB | seeds |\n'
        '| --- | --- | ---: | ---: | ---: | ---: | ---: |\n'
        '| fp32 | FP32 | 0.550 | 2.0 | 1.50 |  | 1 |\n'
        '| fp32_control | FP32 | 0.560 | 2.0 | 1.50 |  | 1 |\n'
        '| gplq | W32A4 | 0.530 | 2.0 | 1.50 |  | 1 |\n'
        '| rtn | W4A4 | 0.400 | 2.0 | 1.50 |  | 1 |\n'
        '| gplq | W4A4 | 0.520 ± 0.028 | 2.0 | 1.50 |  | 2 |\n'
        '| gplq | W3A3 | 0.450 | 2.0 | 1.50 |  | 1 |\n'
    )


def test_variants_models_and_missing_metrics() -> None:
    rows = [
        make_row('gplq', 4, 4, 0.5),
        make_row('gplq', 4, 4, 0.3, variant='no mimicking'),
        make_row('gplq', 4, 4, 0.6, model='swin'),
        make_row('gplq', 4, 4, 0.4, model='swin', metric='segm_mAP'),
        make_row('gplq', 4, 4, 76.25, metric='top1', model='swin'),
    ]
    assert render_table(rows, ['bbox_mAP', 'segm_mAP']).splitlines()[2:] == [
        '| swin | gplq |  | W4A4 | 0.600 | 0.400 | 1 |',
        '| vit | gplq |  | W4A4 | 0.500 |  | 1 |',
        '| vit | gplq | no mimicking | W4A4 | 0.300 |  | 1 |',
    ]
    assert '| 76.2 |' in render_table(rows, ['top1'])


def test_variants_come_in_the_order_in_which_they_are_listed_and_others_behind_them() -> None:
    names = ['lr=1', 'scales only', '100 iterations', '', '10 iterations', 'folded', 'a=2']
    table = render_table([make_row('gplq', 4, 4, 0.5, variant=name) for name in names], ['bbox_mAP'])
    found = [line.split(' | ')[1] for line in table.splitlines()[2:]]
    assert found == ['', 'folded', '10 iterations', '100 iterations', 'scales only', 'a=2', 'lr=1']


def test_bounds_of_the_difference_from_fp32_are_a_column_of_their_own() -> None:
    rows = [make_row('fp32', 32, 32, 0.55)]
    for seed, low in enumerate((-0.02, -0.01)):
        rows += [
            make_row('gplq', 4, 4, 0.56, seed),
            make_row('gplq', 4, 4, low, seed, metric='bbox_mAP_low'),
            make_row('gplq', 4, 4, 0.03, seed, metric='bbox_mAP_high'),
        ]
    assert render_table(rows, ['bbox_mAP'], ['interval', 'minutes']).splitlines() == [
        '| method | bits | bbox mAP | bbox mAP − FP32, 95 % | minutes | seeds |',
        '| --- | --- | ---: | ---: | ---: | ---: |',
        '| fp32 | FP32 | 0.550 |  | 2.0 | 1 |',
        '| gplq | W4A4 | 0.560 ± 0.000 | -0.015 to +0.030 | 2.0 | 2 |',
    ]
    assert 'FP32, 95 %' not in render_table(rows, ['bbox_mAP'])


def test_a_repeated_run_replaces_the_earlier_one() -> None:
    table = render_table([make_row('rtn', 4, 4, 0.1), make_row('rtn', 4, 4, 0.2)], ['bbox_mAP'])
    assert '| 0.200 | 1 |' in table


@pytest.mark.parametrize(('method', 'seed'), [('rtn', 0), ('rtn', 1), ('gplq', 0)])
def test_figures_of_two_checkpoints_do_not_stand_side_by_side(method: str, seed: int) -> None:
    other = make_row(method, 4, 4, 0.2, seed=seed, checkpoint_sha256='1' * 64)
    rows = [make_row('rtn', 4, 4, 0.1), other]
    with pytest.raises(ResultError, match='two checkpoints'):
        render_table(rows, ['bbox_mAP'])


def test_blocks_are_filled_and_the_rest_stays(tmp_path) -> None:
    append_row(tmp_path / 'results/toy.jsonl', make_row('rtn', 4, 4, 0.1, split='val'))
    append_row(tmp_path / 'results/toy.jsonl', make_row('rtn', 4, 4, 0.2))
    page = (
        'before\n\n<!-- table: results/toy.jsonl metrics=bbox_mAP split=test -->\nold\n<!-- /table -->\n\n'
        'middle\n<!-- table: results/none.jsonl metrics=top1 -->\n<!-- /table -->\nafter\n'
    )
    filled = fill_tables(page, tmp_path)
    assert filled == (
        'before\n\n<!-- table: results/toy.jsonl metrics=bbox_mAP split=test -->\n'
        '| method | bits | bbox mAP | seeds |\n| --- | --- | ---: | ---: |\n| rtn | W4A4 | 0.200 | 1 |\n'
        '<!-- /table -->\n\nmiddle\n'
        '<!-- table: results/none.jsonl metrics=top1 -->\n_No rows yet._\n<!-- /table -->\nafter\n'
    )
    assert fill_tables(filled, tmp_path) == filled


def test_a_quoted_marker_is_left_alone(tmp_path) -> None:
    page = '    <!-- table: results/toy.jsonl metrics=top1 -->\n    <!-- /table -->\n'
    assert fill_tables(page, tmp_path) == page


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ('split=test', 'write <!-- table'),
        ('metrics=top1 test', 'write <!-- table'),
        ('metrics=top1 colour=red', 'no field colour'),
        ('metrics=top1 also=speed', 'no field speed'),
    ],
)
def test_unknown_options(tmp_path, options, message) -> None:
    with pytest.raises(ResultError, match=message):
        fill_tables(f'<!-- table: results/toy.jsonl {options} -->\n<!-- /table -->', tmp_path)
