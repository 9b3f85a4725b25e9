from __future__ import annotations

import hashlib
import json
import multiprocessing
import subprocess
import sys
import time
from dataclasses import asdict, replace

import pytest
import torch

from gplq.plugins.results import (
    ResultError,
    ResultRow,
    append_figures,
    append_row,
    commit,
    file_sha256,
    measure,
    read_rows,
    repeat_command,
    versions,
)


@pytest.fixture
def row() -> ResultRow:
    return ResultRow(
        benchmark='toy',
        split='val',
        model='vit',
        scope='backbone',
        checkpoint_sha256='0' * 64,
        method='gplq',
        weight_bits=4,
        activation_bits=4,
        effective_bits=4.2,
        seed=0,
        metric='bbox_mAP',
        value=0.5,
        minutes=1.5,
        peak_memory_mb=100.0,
        artifact_bytes=1000,
        command='python tools/train.py',
        commit='abc',
        versions=dict(torch='2.12.1'),
    )


def test_rows_come_back_as_they_were_written(tmp_path, row) -> None:
    path = tmp_path / 'results' / 'toy.jsonl'
    other = replace(row, method='fp32', weight_bits=32, activation_bits=32, minutes=None, variant='long schedule')
    append_row(path, row)
    append_row(path, other)
    assert read_rows(path) == [row, other]
    assert len(path.read_text().splitlines()) == 2


def test_figures_of_one_run_are_rows_that_differ_in_them_alone(tmp_path, row) -> None:
    append_figures(tmp_path / 'toy.jsonl', row, {'top1': 30.0, 'top5': 60.0})
    assert read_rows(tmp_path / 'toy.jsonl') == [
        replace(row, metric='top1', value=30.0),
        replace(row, metric='top5', value=60.0),
    ]


def test_fields_are_those_of_the_design() -> None:
    names = (
        'benchmark, split, model, scope, checkpoint_sha256, method, weight_bits, activation_bits, '
        'effective_bits, seed, metric, value, minutes, peak_memory_mb, artifact_bytes, command, commit, '
        'versions, variant, calibration_samples, settings_sha256'
    )
    assert list(ResultRow.__dataclass_fields__) == names.split(', ')


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(weight_bits=1), 'weight_bits is 1; 2 to 8, or 32'),
        (dict(activation_bits=16), 'activation_bits is 16'),
        (dict(weight_bits=4.0), 'weight_bits is 4.0'),
        (dict(value=float('nan')), 'value is nan; the run has no result'),
        (dict(value=-1.0), 'bbox_mAP is a fraction'),
        (dict(value=45.3), 'bbox_mAP is a fraction'),
        (dict(metric='top1', value=101.0), 'top1 is a percentage'),
        (dict(scope='neck'), "scope is 'neck'; one of backbone, detector"),
        (dict(checkpoint_sha256='abc'), 'checkpoint_sha256'),
        (dict(benchmark=''), 'benchmark'),
        (dict(seed=-1), 'seed is -1'),
        (dict(seed=True), 'seed is True'),
        (dict(minutes=-0.1), 'minutes'),
        (dict(artifact_bytes=0), 'artifact_bytes is 0'),
        (dict(versions={}), 'versions'),
    ],
)
def test_values_that_no_run_gives(row, change, message) -> None:
    with pytest.raises(ResultError, match=message):
        replace(row, **change)


def test_bad_lines_are_named(tmp_path, row) -> None:
    path = tmp_path / 'toy.jsonl'
    append_row(path, row)
    values = asdict(row)
    for line, message in (
        ('{"benchmark":', 'toy.jsonl, line 2: '),
        ('[]', 'line 2: result row: not an object'),
        (json.dumps({k: v for k, v in values.items() if k != 'seed'}), r"line 2: .*missing \['seed'\]"),
        (json.dumps(values | dict(speed=3)), r"line 2: .*unknown \['speed'\]"),
        (json.dumps(values | dict(weight_bits=9)), 'line 2: .*weight_bits is 9'),
    ):
        path.write_text(path.read_text().splitlines()[0] + '\n' + line + '\n')
        with pytest.raises(ResultError, match=message):
            read_rows(path)


def test_a_row_does_not_join_half_a_line(tmp_path, row) -> None:
    path = tmp_path / 'toy.jsonl'
    path.write_text('{"benchmark": "to')
    append_row(path, row)
    assert json.loads(path.read_text().splitlines()[1]) == asdict(row)


def _append_many(path, row, seed) -> None:
    for _ in range(50):
        append_row(path, replace(row, seed=seed))


def test_processes_do_not_mix_their_lines(tmp_path, row) -> None:
    path = tmp_path / 'toy.jsonl'
    context = multiprocessing.get_context('fork')
    runs = [context.Process(target=_append_many, args=(path, row, seed)) for seed in range(3)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert sorted(r.seed for r in read_rows(path)) == [0] * 50 + [1] * 50 + [2] * 50


def test_file_sha256(tmp_path) -> None:
    path = tmp_path / 'weights'
    path.write_bytes(b'x' * (3 << 20))
    assert file_sha256(path) == hashlib.sha256(b'x' * (3 << 20)).hexdigest()


def test_versions_and_commit_are_known() -> None:
    assert versions()['torch'] == torch.__version__.split('+')[0] or versions()['torch'] == torch.__version__
    assert {'python', 'gplq', 'device'} <= set(versions())
    assert commit()


def test_rows_in_a_tracked_file_do_not_make_the_code_dirty(tmp_path, monkeypatch) -> None:
    def git(*args: str) -> str:
        identity = ['-c', 'user.name=a', '-c', 'user.email=a@b']
        return subprocess.run(
            ['git', *identity, *args], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout

    code, rows = tmp_path / 'plugins' / 'results.py', tmp_path / 'results' / 'a.jsonl'
    for file in (code, rows):
        file.parent.mkdir()
        file.write_text('')
    git('init', '-q')
    git('add', '.')
    git('commit', '-qm', 'first')
    monkeypatch.setattr('gplq.plugins.results.__file__', str(code))
    rows.write_text('{}')
    assert commit() == git('rev-parse', 'HEAD').strip()
    code.write_text('x = 1')
    assert commit() == git('rev-parse', 'HEAD').strip() + '-dirty'


@pytest.mark.skipif(torch.cuda.is_available(), reason='on a GPU the peak is the GPU memory')
def test_measure_takes_time_and_the_blocks_own_peak() -> None:
    with measure() as large:
        block = torch.ones(60 << 20)
        time.sleep(0.06)
        del block
    with measure() as small:
        pass
    assert 0.001 <= large.minutes < 1
    assert large.peak_memory_mb > 240
    assert small.minutes < large.minutes
    # Where the allocator keeps what was freed both are alike, to the pages that the kernel has yet to count.
    assert small.peak_memory_mb <= large.peak_memory_mb + 1


def test_measure_is_filled_when_the_block_fails() -> None:
    with pytest.raises(KeyError), measure() as result:
        raise KeyError
    assert result.minutes > 0


def test_a_command_asks_for_what_is_of_this_machine_alone(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys, 'orig_argv', ['/usr/bin/python3', 'tools/test.py', f'{tmp_path}/a b.pth', 'ann_file=/disk/data/dev.json']
    )
    monkeypatch.setenv('GPLQ_DATA_ROOT', '/disk/data')
    command = repeat_command()
    assert command == (
        "GPLQ_DATA_ROOT=${GPLQ_DATA_ROOT:?} python tools/test.py 'a b.pth' ann_file=${GPLQ_DATA_ROOT}/dev.json"
    )
    monkeypatch.delenv('GPLQ_DATA_ROOT')
    asked = subprocess.run(['sh', '-c', command], capture_output=True, text=True)
    assert asked.returncode and 'GPLQ_DATA_ROOT' in asked.stderr


@pytest.mark.parametrize(
    ('root', 'argument', 'pasted'),
    [
        ('data', 'val_dataloader.num_workers=0', 'val_dataloader.num_workers=0'),
        ('data', 'val_evaluator.ann_file=data/dev.json', 'val_evaluator.ann_file=${GPLQ_DATA_ROOT}/dev.json'),
        ('data', 'data_root=data', 'data_root=${GPLQ_DATA_ROOT}'),
        ('data', 'data/dev.json', '${GPLQ_DATA_ROOT}/dev.json'),
        ('data/', 'ann_file=data/dev.json', 'ann_file=${GPLQ_DATA_ROOT}/dev.json'),
        ('data', 'old/data/dev.json', 'old/data/dev.json'),
        ('data', 'database/dev.json', 'database/dev.json'),
        ('/disk', 'load_from=/disk/a/fp32.pth', 'load_from=${GPLQ_CHECKPOINT}'),
        ('/a=b', '--annotations=/a=b/dev.json', '--annotations=${GPLQ_DATA_ROOT}/dev.json'),
        ('/a=b', '/a=b/dev.json', '${GPLQ_DATA_ROOT}/dev.json'),
        ('/disk', "ann_file=/disk/my $HOME's val.json", None),
        ('/my disk', 'ann_file=/my disk/dev.json', 'ann_file="${GPLQ_DATA_ROOT}"/dev.json'),
        ('/disk', 'a key=/disk', '\'a key=\'"${GPLQ_DATA_ROOT}"'),
        ('data', "note='${GPLQ_DATA_ROOT}'", None),
        ('data', '', "''"),
    ],
)
def test_a_shell_makes_the_argument_of_the_command_again(
    monkeypatch: pytest.MonkeyPatch, root: str, argument: str, pasted: str | None
) -> None:
    monkeypatch.setenv('GPLQ_DATA_ROOT', root)
    monkeypatch.setenv('GPLQ_CHECKPOINT', '/disk/a/fp32.pth')
    monkeypatch.setattr(sys, 'orig_argv', ['/usr/bin/python3', 'tools/test.py', argument])
    command = repeat_command()
    if pasted is not None:
        assert command.endswith(f'python tools/test.py {pasted}')
    shell = f'python() {{ for last; do :; done; printf %s "$last"; }}\n{command}'
    again = subprocess.run(['sh', '-c', shell], capture_output=True, text=True, check=True).stdout
    assert again.replace('//', '/') == argument
