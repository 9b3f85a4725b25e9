"""Courses by hand, a plot that can be opened, and the tool that prints both."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from gplq.plugins.benchmark import Run, curve_of, rows_of
from gplq.plugins.campaign import carry_out
from gplq.plugins.curves import Course, courses_of, draw, table
from gplq.plugins.hooks.curve import CURVE
from gplq.plugins.results import ResultError, read_rows

TOOL = Path(__file__).parents[2] / 'tools' / 'plot_curves.py'
SLOW = Course('lsq', 'W2A2', 0, ((2.0, 10.0), (4.0, 20.0), (10.0, 26.0)))
FAST = Course('gplq', 'W2A2', 0, ((3.0, 23.0),))


def test_between_two_validations_in_proportion() -> None:
    assert SLOW.minutes_to(23.0) == 7.0
    assert SLOW.minutes_to(10.0) == SLOW.minutes_to(5.0) == 2.0
    assert SLOW.minutes_to(26.5) is None
    assert SLOW.value_at(3.0) == 15.0 and SLOW.value_at(4.0) == 20.0
    assert SLOW.value_at(1.0) is None and SLOW.value_at(99.0) == 26.0
    back = Course('lsq', 'W2A2', 0, ((1.0, 10.0), (2.0, 30.0), (3.0, 20.0), (4.0, 25.0)))
    assert back.minutes_to(25.0) == 1.75, 'the first time counts'


def test_the_table_says_who_gets_where_by_when() -> None:
    second = Course('lsq', 'W2A2', 1, ((2.0, 10.0), (4.0, 20.0)))
    lines = table([SLOW, FAST], 'gplq').splitlines()
    assert lines[2:] == [
        '| gplq | W2A2 | 3.0 | 23.00 | 3.0 | 23.00 | 1 |',
        '| lsq | W2A2 | 10.0 | 26.00 | 7.0 | 15.00 | 1 |',
    ]
    # One of the two seeds never gets there: no mean over the other alone.
    assert table([SLOW, second, FAST], 'gplq').splitlines()[3] == '| lsq | W2A2 | 7.0 | 23.00 | never | 15.00 | 2 |'
    # Three seeds of the reference, validated at the end alone: one never gets to their mean.
    ends = [Course('gplq', 'W2A2', seed, ((2.0 + seed, 80.0 + seed),)) for seed in range(3)]
    assert table(ends, 'gplq').splitlines()[2] == '| gplq | W2A2 | 3.0 | 81.00 | 3.0 | 81.00 | 3 |'
    other = Course('gplq', 'W4A4', 0, ((3.0, 23.0),))
    assert table([SLOW, other], 'gplq').splitlines()[3] == '| lsq | W2A2 | 10.0 | 26.00 |  |  | 1 |'
    with pytest.raises(ResultError, match=r"--reference vvtq: there are courses of \['gplq', 'lsq'\]"):
        table([SLOW, FAST], 'vvtq')


@pytest.fixture
def finished(make_runs: Callable[..., list[Run]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """A run of each method as a program that stands in for tools/train.py leaves it, not carried out yet."""
    monkeypatch.chdir(tmp_path)
    Path('tools').mkdir()
    Path('configs').mkdir()
    Path('configs/a.py').touch()
    points = [
        {'iteration': n, 'minutes': float(n), 'metrics': {'accuracy/top1': 10.0 * n, 'oscillating': 5.0 - n}}
        for n in (1, 2)
    ]
    Path('tools/train.py').write_text(
        'import json, pathlib, sys\n'
        "work = pathlib.Path(sys.argv[sys.argv.index('--work-dir') + 1])\n"
        "steps = ['FP32'] if 'fp32' in work.name else ['W32A2', 'W2A2']\n"
        'cost = dict(minutes=2.5, effective_bits=2.0, model_bytes=9, peak_memory_mb=7.0, scope="backbone")\n'
        "noted = [dict(cost, step=step, metrics={'accuracy/top1': 21.0}) for step in steps]\n"
        "(work / 'gplq.json').write_text(json.dumps(noted))\n"
        f"if 'fp32' not in work.name:\n    (work / '{CURVE}').write_text({json.dumps(points)!r})\n"
    )
    return make_runs(['fp32', 'gplq', 'lsq'], [2], [0], [''], task='classification')


def test_runs_leave_rows_of_their_validations(finished: list[Run]) -> None:
    rows, curves = Path('rows.jsonl'), Path('curves.jsonl')
    carry_out(finished, ['top1'], '/data', rows, curves)
    found = [(r.method, r.weight_bits, r.metric, r.minutes, r.value) for r in read_rows(curves)]
    assert found == [
        (method, bits, metric, minutes, value)
        for method, bits in (('gplq', 32), ('lsq', 2))
        for minutes, figures in ((1.0, (10.0, 4.0)), (2.0, (20.0, 3.0)))
        for metric, value in zip(('top1', 'oscillating'), figures, strict=True)
    ]
    carry_out(finished, ['top1'], '/data', rows, curves)
    assert len(read_rows(curves)) == len(found), 'runs that are done leave no second curve'
    courses = courses_of([read_rows(rows), read_rows(curves)], 'top1')
    ends = {(course.name, course.bits): course.points for course in courses}
    assert ends['lsq', 'W2A2'] == ((1.0, 10.0), (2.0, 20.0), (2.5 * 2, 21.0))
    assert ends['gplq', 'W2A2'] == ((5.0, 21.0),)
    assert ends['fp32', 'FP32'] == ((2.5, 21.0),)
    swin = replace(read_rows(rows)[0], model='swin')
    with pytest.raises(ResultError, match=r'several models, checkpoints or splits: .*swin'):
        courses_of([[*read_rows(rows), swin]], 'top1')
    again = [replace(row, minutes=row.minutes - 0.5, value=1.0) for row in read_rows(curves) if row.method == 'lsq']  # type: ignore[operator]
    repeated = {course.name: course.points for course in courses_of([[*read_rows(curves), *again]], 'top1')}
    assert repeated['lsq'] == ((0.5, 1.0), (1.5, 1.0)), 'the later run replaces the earlier one'
    with pytest.raises(ResultError, match='no rows of bbox_mAP'):
        courses_of([read_rows(rows)], 'bbox_mAP')


def test_a_stage_that_is_taken_over_has_no_curve_of_its_own(finished: list[Run], tmp_path: Path) -> None:
    gplq = finished[1]
    carry_out([gplq], ['top1'], '/data', Path('rows.jsonl'))
    rows = rows_of(gplq, ['top1'], 'model')
    assert len(curve_of(gplq, rows)) == 4
    assert curve_of(gplq.__class__(**{**vars(gplq), 'trained_by': gplq}), rows) == []
    assert not Path('curves.jsonl').exists()


def test_the_tool_draws_and_prints(finished: list[Run]) -> None:
    rows, curves = Path('rows.jsonl'), Path('curves.jsonl')
    carry_out(finished, ['top1'], '/data', rows, curves)

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, str(TOOL), *arguments], capture_output=True, text=True, timeout=120)

    done = call('rows.jsonl', 'curves.jsonl', '--metrics', 'top1', 'oscillating', '--bits', 'W2A2', '--output', 'c.png')
    assert done.returncode == 0, done.stderr
    assert '| lsq | W2A2 | 5.0 | 21.00 | 5.0 | 21.00 | 1 |' in done.stdout
    with Image.open('c.png') as picture:
        # Two panels of 6.5 by 5 inches.
        assert picture.size == (1430, 550)
    assert 'nowhere.jsonl: no such file' in call('nowhere.jsonl').stderr
    assert 'no rows of top1' in call('rows.jsonl', '--model', 'swin').stderr
    assert '--bits W3A3: no rows of top1 have them' in call('rows.jsonl', '--bits', 'W3A3').stderr


def test_lines_of_a_plot_are_of_one_colour_a_method(tmp_path: Path) -> None:
    draw([('top1', [SLOW, FAST, SLOW._replace(seed=1)])], tmp_path / 'one.png')
    with Image.open(tmp_path / 'one.png') as picture:
        colours = {colour for _, colour in picture.convert('RGB').getcolors(1 << 20)}
    # matplotlib's first two.
    assert {(31, 119, 180), (255, 127, 14)} <= colours
    assert (44, 160, 44) not in colours
