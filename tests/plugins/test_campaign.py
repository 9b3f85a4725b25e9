"""Runs one after the other, through a program that stands in for tools/train.py and notes what it was called with."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from gplq.plugins.benchmark import Run
from gplq.plugins.campaign import MARK, carry_out, model_of_config, raise_failures, read, task_of
from gplq.plugins.results import ResultError, read_rows

TRAIN = """
import json, pathlib, sys
options = dict(part.split('=', 1) for part in sys.argv[sys.argv.index('--cfg-options') + 1:])
work = pathlib.Path(sys.argv[sys.argv.index('--work-dir') + 1])
weights, activations = (options.get(f'default_hooks.gplq.{kind}_bits') for kind in ('weight', 'activation'))
start = pathlib.Path(options['load_from'])
if not start.is_file():
    sys.exit(f'error: checkpoint {start} does not exist')
if options['default_hooks.gplq.seed'] == '9':
    sys.exit('ValueError: nine')
steps = ['FP32'] if weights == '32' else [f'W32A{activations}', f'W{weights}A{activations}']
cost = dict(minutes=1.0, effective_bits=4.0, model_bytes=9, peak_memory_mb=7.0)
note = dict(cost, metrics={'top1': 50.0}, scope='backbone')
(work / 'gplq.json').write_text(json.dumps([dict(note, step=step, calibration_samples=8) for step in steps]))
(work / f'gplq_w32a{activations}.pth').write_text('stage')
with open('calls.txt', 'a') as calls:
    calls.write(work.name + '\\n')
"""


HOOK = "default_hooks = dict(gplq=dict(type='gplq.plugins.GPLQHook'))\n"


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    monkeypatch.chdir(tmp_path)
    Path('tools').mkdir()
    Path('tools/train.py').write_text(TRAIN)
    Path('calls.txt').touch()
    Path('configs').mkdir()
    Path('configs/a.py').write_text(HOOK)
    return lambda: Path('calls.txt').read_text().split()


def test_what_is_measured_is_not_measured_again(
    calls: Callable[[], list[str]], make_runs: Callable[..., list[Run]]
) -> None:
    output = Path('rows.jsonl')
    plan = lambda bits: make_runs(['fp32', 'rtn', 'gplq'], bits, [0], [''], task='classification')  # noqa: E731
    carry_out(plan([4]), ['top1'], '/data', output)
    assert calls() == ['fp32_w32_s0', 'rtn_w4_s0', 'gplq_w4_s0']
    carry_out(plan([4, (3, 4)]), ['top1'], '/data', output)
    assert calls()[3:] == ['rtn_w3a4_s0', 'gplq_w3a4_s0']
    rows = read_rows(output)
    assert [(r.method, r.weight_bits, r.activation_bits, r.minutes) for r in rows] == [
        ('fp32', 32, 32, 1.0),
        ('rtn', 4, 4, 2.0),
        ('gplq', 32, 4, 1.0),
        ('gplq', 4, 4, 2.0),
        ('rtn', 3, 4, 2.0),
        # One minute of the stage that it shares, and two of its own.
        ('gplq', 3, 4, 3.0),
    ]
    assert {row.calibration_samples for row in rows} == {8}


def test_a_model_can_be_named(calls: Callable[[], list[str]], make_runs: Callable[..., list[Run]]) -> None:
    (run,) = make_runs(['rtn'], [4], [0], [''], task='classification')
    carry_out([replace(run, model='vit')], ['top1'], '/data', Path('rows.jsonl'))
    assert {row.model for row in read_rows('rows.jsonl')} == {'vit'}


def test_a_stage_whose_checkpoint_is_gone_is_trained_again_without_rows_of_its_own(
    calls: Callable[[], list[str]], make_runs: Callable[..., list[Run]]
) -> None:
    output = Path('rows.jsonl')
    first, *_ = make_runs(['gplq'], [4], [0], [''], task='classification')
    carry_out([first], ['top1'], '/data', output)
    first.stage_file.unlink()
    carry_out(make_runs(['gplq'], [4, (2, 4)], [0], [''], task='classification'), ['top1'], '/data', output)
    assert calls() == ['gplq_w4_s0', 'gplq_w4_s0', 'gplq_w2a4_s0']
    assert [(row.weight_bits, row.metric) for row in read_rows(output)] == [(32, 'top1'), (4, 'top1'), (2, 'top1')]


def test_another_config_is_another_measurement(
    calls: Callable[[], list[str]], make_runs: Callable[..., list[Run]]
) -> None:
    output = Path('rows.jsonl')
    runs = make_runs(['fp32', 'rtn'], [4], [0], [''], task='classification')
    for text in (HOOK, f'# A comment says nothing.\n{HOOK}', HOOK + 'default_hooks["gplq"]["mimicking"] = 10'):
        Path('configs/a.py').write_text(text)
        carry_out(runs, ['top1'], '/data', output)
    assert calls() == 2 * ['fp32_w32_s0', 'rtn_w4_s0']
    rows = read_rows(output)
    assert len({row.settings_sha256 for row in rows}) == 2 and len(rows) == 4


def test_settings_that_return_are_measured_again(
    calls: Callable[[], list[str]], make_runs: Callable[..., list[Run]]
) -> None:
    """Or tables would show the others' figures, which came later."""
    runs = make_runs(['rtn'], [4], [0], [''], task='classification')
    for text in (HOOK, HOOK + 'default_hooks["gplq"]["mimicking"] = 10', HOOK):
        Path('configs/a.py').write_text(text)
        carry_out(runs, ['top1'], '/data', Path('rows.jsonl'))
    assert calls() == 3 * ['rtn_w4_s0']


@pytest.mark.parametrize('damage', ['', '{'])
def test_a_stage_with_a_damaged_mark_is_trained_again(
    damage: str, calls: Callable[[], list[str]], make_runs: Callable[..., list[Run]]
) -> None:
    first, second = make_runs(['gplq'], [4, (2, 4)], [0], [''], task='classification')
    carry_out([first], ['top1'], '/data', Path('rows.jsonl'))
    (first.work_dir / MARK).write_text(damage)
    carry_out([first, second], ['top1'], '/data', Path('rows.jsonl'))
    assert calls() == [*2 * ['gplq_w4_s0'], 'gplq_w2a4_s0']


@pytest.mark.parametrize('what', ['checkpoint', 'config'])
def test_a_stage_of_another_checkpoint_or_config_is_not_gone_on_with(
    what: str, calls: Callable[[], list[str]], make_runs: Callable[..., list[Run]]
) -> None:
    """Its folder has the same name."""
    output = Path('rows.jsonl')
    first, second = make_runs(['gplq'], [4, (2, 4)], [0], [''], task='classification')
    carry_out([first], ['top1'], '/data', output)
    place = Path(first.checkpoint if what == 'checkpoint' else first.config)
    before = place.read_text()
    place.write_text(f'{HOOK}other = 1')
    carry_out([first], ['top1'], '/data', output)
    place.write_text(before)
    carry_out([first, second], ['top1'], '/data', output)
    assert calls() == [*3 * ['gplq_w4_s0'], 'gplq_w2a4_s0']


def test_a_failed_run_says_why_and_does_not_keep_the_others_from_running(
    calls: Callable[[], list[str]], make_runs: Callable[..., list[Run]]
) -> None:
    output = Path('rows.jsonl')
    failed = carry_out(make_runs(['rtn'], [4], [9, 0], [''], task='classification'), ['top1'], '/data', output)
    assert [row.seed for row in read_rows(output)] == [0]
    with pytest.raises(ResultError, match=r'(?s)1 runs failed.*ValueError: nine\nsee .*rtn_w4_s9/log.txt'):
        raise_failures(failed)
    raise_failures([])


def test_what_needs_the_stage_of_a_failed_run_fails_with_it(
    calls: Callable[[], list[str]], make_runs: Callable[..., list[Run]]
) -> None:
    runs = make_runs(['gplq', 'rtn'], [(8, 4), 4], [9], [''], task='classification')
    failed = carry_out(runs, ['top1'], '/data', Path('rows.jsonl'))
    assert len(failed) == 4 and sum('the activation stage of' in words for words in failed) == 1


def test_the_run_of_as_many_bits_trains_the_stage_whatever_the_order(make_runs: Callable[..., list[Run]]) -> None:
    for bits in ([8, 4, (8, 4), (2, 4)], [(2, 4), (8, 4), 4, 8]):
        runs = make_runs(['gplq'], bits, [0], [''])
        assert {run.bits: run.trained_by and run.trained_by.bits for run in runs} == {
            (8, 8): None,
            (4, 4): None,
            (2, 4): (4, 4),
            (8, 4): (4, 4),
        }


# Writes that it has begun and waits to be killed, the first time.
WAIT = """
import os, pathlib, subprocess, sys, time
work = pathlib.Path(sys.argv[sys.argv.index('--work-dir') + 1])
if not (work / 'gplq_resume.pth').exists():
    (work / 'gplq_resume.pth').touch()
    child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])
    pathlib.Path('pids.txt').write_text(f'{os.getpid()} {child.pid}')
    time.sleep(600)
assert sys.argv[-1] == '--resume', sys.argv
sys.argv.pop()
"""
CARRY_OUT = """
import signal, sys
# A shell's background jobs ignore Ctrl-C, and so would a child of tests that are one.
signal.signal(signal.SIGINT, signal.default_int_handler)
from pathlib import Path
from gplq.plugins.benchmark import plan_runs
from gplq.plugins.campaign import carry_out
from gplq.plugins.command_line import exit_on_error
runs = list(plan_runs('cells', 'configs/a.py', 'fp32.pth', 'dev', ['rtn'], [(4, 4)], [0], [''], {}, Path('work'),
                      'classification'))
exit_on_error(lambda: print(carry_out(runs, ['top1'], '/data', Path('rows.jsonl'))))
"""


def running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # What nobody has waited for yet is a zombie.
    return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] != 'Z'


@pytest.mark.parametrize(('number', 'code'), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_what_is_interrupted_leaves_no_process_behind_and_is_resumed(
    number: signal.Signals, code: int, calls: Callable[[], list[str]]
) -> None:
    Path('fp32.pth').write_bytes(b'weights')
    Path('tools/train.py').write_text(WAIT + TRAIN)
    command = [sys.executable, '-c', CARRY_OUT]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as first:
        while not Path('pids.txt').exists() or not Path('pids.txt').read_text():
            assert first.poll() is None, first.communicate()
            time.sleep(0.05)
        pids = [int(pid) for pid in Path('pids.txt').read_text().split()]
        # Two in one folder would spoil each other's files.
        second = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert 'another process is at work in work/dev/rtn_w4_s0' in second.stdout
        first.send_signal(number)
        _, errors = first.communicate(timeout=60)
    assert first.returncode == code and 'Traceback' not in errors
    time.sleep(0.2)
    assert not any(running(pid) for pid in pids)
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and '[]' in done.stdout, done.stdout + done.stderr
    assert len(read_rows('rows.jsonl')) == 1


def test_a_missing_checkpoint_is_found_before_anything_runs(
    calls: Callable[[], list[str]], make_runs: Callable[..., list[Run]]
) -> None:
    runs = make_runs(['rtn'], [4], [0], [''])
    Path(runs[0].checkpoint).unlink()
    with pytest.raises(ResultError, match=r'checkpoint .*fp32.pth does not exist'):
        carry_out(runs, ['top1'], '/data', Path('rows.jsonl'))
    assert calls() == []


def test_the_last_words_of_a_log_are_the_reason_where_no_error_is_named(
    calls: Callable[[], list[str]], make_runs: Callable[..., list[Run]]
) -> None:
    runs = make_runs(['rtn'], [4], [0], [''], task='classification')
    for words in ('torch.cuda.OutOfMemoryError: no memory', 'Killed'):
        Path('tools/train.py').write_text(f'import sys; sys.exit({words!r})')
        (failed,) = carry_out(runs, ['top1'], '/data', Path('rows.jsonl'))
        assert f'failed: {words}\nsee ' in failed
    Path('tools/train.py').unlink()
    with pytest.raises(ResultError, match='start this program from the repository'):
        carry_out(runs, ['top1'], '/data', Path('rows.jsonl'))


def test_task_and_model_are_read_from_the_config(tmp_path: Path) -> None:
    config = tmp_path / 'gplq_vit_cells.py'
    config.write_text(HOOK + "val_dataloader = dict(dataset=dict(split='dev'))")
    assert task_of(read(str(config)), 'a.py') == 'classification'
    config.write_text(HOOK + "val_dataloader = dict(dataset=dict(type='CocoDataset'))")
    assert task_of(read(str(config)), 'a.py') == 'detection'
    assert model_of_config(str(config), 'cells') == 'vit'


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        (HOOK, 'has no val_dataloader with a dataset'),
        (HOOK + 'val_dataloader = dict(batch_size=2)', 'has no val_dataloader with a dataset'),
        ('val_dataloader = dict(dataset=dict(a=1))', 'has no default_hooks = dict'),
        ("default_hooks = dict(gplq=dict(type='gplq.plugins.PTQ4ViTHook'))", 'has no default_hooks = dict'),
        ('default_hooks = dict(', 'cannot be read: SyntaxError'),
        (None, 'does not exist'),
    ],
)
def test_configs_that_cannot_be_measured(text: str | None, message: str, tmp_path: Path) -> None:
    config = tmp_path / 'a.py'
    if text is not None:
        config.write_text(text)
    with pytest.raises(ResultError, match=message):
        task_of(read(str(config)), 'a.py')
