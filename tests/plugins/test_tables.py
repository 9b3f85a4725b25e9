from __future__ import annotations

from pathlib import Path

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


def with_bounds(value: float, seed: int, low: float, high: float) -> list[ResultRow]:
    ends = (('_low', low), ('_high', high))
    return [
        make_row('gplq', 4, 4, value, seed, metric='top1'),
        *(make_row('gplq', 4, 4, bound, seed, metric=f'top1{end}') for end, bound in ends),
    ]


def test_bounds_of_a_figure_that_was_measured_again_are_not_beside_the_new_one() -> None:
    again = make_row('gplq', 4, 4, 60.0, metric='top1')
    other = make_row('gplq', 4, 4, 49.0, 1, metric='top1')
    rows = [*with_bounds(49.0, 0, -2.0, 0.5), again, other]
    assert '| 54.5 ± 7.8 |  | 2 |' in render_table(rows, ['top1'], ['interval'])
    # One new bound does not make an interval with an old one.
    assert '|  | 2 |' in render_table(rows + with_bounds(60.0, 0, 8.0, 9.0)[1:2], ['top1'], ['interval'])
    rows += with_bounds(60.0, 0, 8.0, 10.0)[1:]
    assert '| +8.0 to +10.0 | 2 |' in render_table(rows, ['top1'], ['interval'])
    rows += with_bounds(49.0, 1, -2.0, 1.0)[1:]
    assert '| +3.0 to +5.5 | 2 |' in render_table(rows, ['top1'], ['interval'])


def test_a_share_that_is_nearly_all_does_not_read_as_all() -> None:
    assert '| 99.96 |' in render_table([make_row('gplq', 4, 4, 99.96, metric='equal_codes')], ['equal_codes'])


def test_a_repeated_run_replaces_the_earlier_one() -> None:
    table = render_table([make_row('rtn', 4, 4, 0.1), make_row('rtn', 4, 4, 0.2)], ['bbox_mAP'])
    assert '| 0.200 | 1 |' in table


@pytest.mark.parametrize(('method', 'seed'), [('rtn', 0), ('rtn', 1), ('gplq', 0)])
def test_figures_of_two_checkpoints_do_not_stand_side_by_side(method: str, seed: int) -> None:
    other = make_row(method, 4, 4, 0.2, seed=seed, checkpoint_sha256='1' * 64)
    rows = [make_row('rtn', 4, 4, 0.1), other]
    with pytest.raises(ResultError, match='two checkpoints'):
        render_table(rows, ['bbox_mAP'])


def test_exports_of_several_seeds_are_of_as_many_checkpoints() -> None:
    rows = [
        make_row('gplq', 4, 4, 0.5 + 0.2 * seed, seed=seed, checkpoint_sha256=str(seed) * 64, benchmark='export')
        for seed in (0, 1)
    ]
    assert '| 0.600 ± 0.141 | 2 |' in render_table(rows, ['bbox_mAP'])
    again = make_row('gplq', 4, 4, 0.4, seed=1, checkpoint_sha256='2' * 64, benchmark='export')
    with pytest.raises(ResultError, match='two checkpoints'):
        render_table([*rows, again], ['bbox_mAP'])


def test_what_a_config_said_before_and_after_a_change_does_not_stand_side_by_side() -> None:
    def row(method: str, value: float, settings: str | None, config: str = 'configs/a.py', **changes) -> ResultRow:
        command = f'python tools/train.py {config} --cfg-options a=1'
        return make_row(method, 4, 4, value, settings_sha256=settings, command=command, **changes)

    before, after = 64 * 'a', 64 * 'b'
    rows = [row('gplq', 0.5, before), row('rtn', 0.4, before), row('rtn', 0.3, after, seed=1)]
    with pytest.raises(
        ResultError, match=r"configs/a.py or its data .* by gplq '' and by rtn '' .*aaaaaaaa and bbbbbbb"
    ):
        render_table(rows, ['bbox_mAP'])
    # The older one is to be measured again, whatever comes first in the table.
    with pytest.raises(
        ResultError, match=r"by rtn '' and by gplq '' .*aaaaaaaa and bbbbbbb.* measure the former again"
    ):
        render_table([*rows[:2], row('gplq', 0.6, after)], ['bbox_mAP'])
    # What was measured again is not shown, rows without a hash may be, and another config is another matter.
    again = [row('gplq', 0.6, after), row('rtn', 0.3, after), row('qwt', 0.2, None), row('lsq', 0.1, before, 'b.py')]
    assert '0.600' in render_table([*rows, *again], ['bbox_mAP'])
    # Nor are bounds compared, whose program reads no config.
    ends = {'_low': -0.1, '_high': 0.1}
    bounds = [
        make_row(method, 4, 4, value, metric=f'bbox_mAP{end}', settings_sha256=settings, command='python bootstrap.py')
        for method, settings in (('gplq', after), ('lsq', before))
        for end, value in ends.items()
    ]
    assert '-0.100 to +0.100' in render_table([*rows, *again, *bounds], ['bbox_mAP'], ['interval'])


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A folder with `results/toy.jsonl`: rows of round-to-nearest on two splits and of ours on one."""
    rows = [make_row('rtn', 4, 4, 0.1, split='val'), make_row('rtn', 4, 4, 0.2), make_row('gplq', 4, 4, 0.3)]
    for row in [*rows, make_row('gplq', 4, 4, 76.25, metric='top1', split='val')]:
        append_row(tmp_path / 'results/toy.jsonl', row)
    return tmp_path


OPEN, CLOSE = '<!-- table: results/toy.jsonl metrics=bbox_mAP split=test method=rtn -->', '<!-- /table -->'
TABLE = '| method | bits | bbox mAP | seeds |\n| --- | --- | ---: | ---: |\n| rtn | W4A4 | 0.200 | 1 |\n'


def test_blocks_are_filled_and_the_rest_stays(results: Path) -> None:
    other = '<!-- table: results/toy.jsonl metrics=top1 split=val -->'
    page = f'before\n\n{OPEN}\nold\n{CLOSE}\n\nmiddle\n{other}\n{CLOSE} behind\nafter'
    filled = fill_tables(page, results)
    assert filled == (
        f'before\n\n{OPEN}\n{TABLE}{CLOSE}\n\nmiddle\n{other}\n'
        '| method | bits | top1 | seeds |\n| --- | --- | ---: | ---: |\n| gplq | W4A4 | 76.2 | 1 |\n'
        f'{CLOSE} behind\nafter'
    )
    assert fill_tables(filled, results) == filled


@pytest.mark.parametrize(
    'page',
    [
        f'    {OPEN}\n    {CLOSE}\n',
        f'So:\n\n    {OPEN}\n\n\t{CLOSE}\n\nand so on',
        f'```\n{OPEN}\n```\n',
        f'~~~~ html\n```\n~~~\n{OPEN}\n~~~~',
        f'- a list\n\n  ```\n  {OPEN}\n  ```\n',
        f'- ```\n  {OPEN}\n  ```\n',
        f'- a list\n\n      {OPEN}\n\nText\n\n    {OPEN}\n',
        f'`{OPEN}` opens a table, `{CLOSE}` closes it',
        f'```inline``` and\n`{OPEN}`',
    ],
)
def test_a_quoted_marker_is_left_alone(results: Path, page: str) -> None:
    assert fill_tables(page, results) == page
    assert fill_tables(f'{page}\n\n{OPEN}\n{CLOSE}', results) == f'{page}\n\n{OPEN}\n{TABLE}{CLOSE}'


@pytest.mark.parametrize(
    ('page', 'message'),
    [
        (f'{OPEN}\ntext\n\n{OPEN}\n{CLOSE}\n', 'line 4, <!-- table: .*: the table of line 1 is open; close it'),
        (f'text\n{OPEN}\ntext', 'line 2, <!-- table: .*: the table is never closed; write <!-- /table --> below'),
        (f'text\n\n{CLOSE}\n', 'line 3, <!-- /table -->: no table is open'),
        (f'{OPEN}\n<!-- /Table -->\n', 'line 2, <!-- /Table -->: this is no marker'),
        (f'  {OPEN}\n  {CLOSE}\n', 'line 1, .*: this is no marker of a table; write .* at the start of a line'),
        (f'text\n    {OPEN}\n', 'line 2, .*: this is no marker'),
        (f'1. a list\n\n    {OPEN}\n', 'line 3, .*: this is no marker'),
        (f'- {OPEN}\n', 'line 1, .*: this is no marker'),
        (f'{OPEN} \n{CLOSE}', 'line 1, .*: this is no marker'),
        ('<!-- table: results/toy.jsonl metrics=top1-->\n', 'line 1, .*metrics=top1-->: this is no marker'),
        ('<!-- Table: results/toy.jsonl metrics=top1 -->\n', 'line 1, <!-- Table: .*: this is no marker'),
        ('<!--table: results/toy.jsonl metrics=top1 -->\n', 'line 1, <!--table: .*: this is no marker'),
        ('<!-- table: results/toy.jsonl\n metrics=top1 -->\n', 'line 1, .*: this is no marker'),
        (f'```\ncode\n\n{OPEN}\n{CLOSE}\n', 'line 1, ```: this block of code is never closed'),
    ],
)
def test_a_marker_that_is_misspelled_or_has_no_partner(results: Path, page: str, message: str) -> None:
    with pytest.raises(ResultError, match=message):
        fill_tables(page, results)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ('', 'write <!-- table'),
        ('results/toy.jsonl split=test', 'write <!-- table'),
        ('results/toy.jsonl metrics=top1 test', 'write <!-- table'),
        ('results/toy.jsonl metrics=top1 colour=red', 'no field colour'),
        ('results/toy.jsonl metrics=top1 also=speed', 'no field speed'),
        ("results/toy.jsonl metrics=top1 variant='no mimicking", 'No closing quotation; quote values'),
        ('results/none.jsonl metrics=top1', "file 'results/none.jsonl' does not exist"),
        ('results/toy.jsonl metrics=tpo1', 'no row of results/toy.jsonl has metric=tpo1; correct it'),
        ('results/toy.jsonl metrics=bbox_mAP,tpo1', 'has metric=tpo1; correct it'),
        ('results/toy.jsonl metrics=bbox_mAP split=tset model=vit', 'has split=tset; correct it'),
        ('results/toy.jsonl metrics=bbox_mAP method=gplq,rnt', 'has method=rnt; correct it'),
        ('results/toy.jsonl metrics=bbox_mAP,top1 split=test', 'has metric=top1 with the other options'),
        ('results/toy.jsonl metrics=top1 split=test', 'has metric=top1, split=test with the other options'),
        ('results/toy.jsonl metrics=bbox_mAP method=lsq', 'has metric=bbox_mAP with the other options'),
    ],
)
def test_unknown_options(results: Path, options: str, message: str) -> None:
    with pytest.raises(ResultError, match='line 2, <!-- table: .*: .*' + message):
        fill_tables(f'\n<!-- table: {options} -->\n{CLOSE}', results)


def test_rows_of_a_known_method_may_be_still_to_come(results: Path) -> None:
    page = f'<!-- table: results/toy.jsonl metrics=bbox_mAP method=rtn,lsq split=test -->\n{CLOSE}'
    assert TABLE in fill_tables(page, results)
