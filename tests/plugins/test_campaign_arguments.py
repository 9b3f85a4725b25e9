"""Command lines of benchmark programs, read into a request."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from gplq.plugins.campaign_arguments import Request, add_campaign_arguments, request_of
from gplq.plugins.results import ResultError

CONFIG = """
default_hooks = dict(gplq=dict(type='gplq.plugins.GPLQHook'))
val_dataloader = dict(dataset=dict(split='dev'))
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv('GPLQ_DATA_ROOT', '/data')
    path = tmp_path / 'gplq_vit_cells.py'
    path.write_text(CONFIG)
    return str(path)


def read(*arguments: str) -> Request:
    parser = argparse.ArgumentParser()
    add_campaign_arguments(parser, bits=('4', 'W3A4'))
    return request_of(parser.parse_args(arguments))


def test_what_is_not_said_follows_from_the_config(config: str) -> None:
    request = read(config, 'fp32.pth')
    assert request.name == 'vit_cells'
    assert (request.task, request.metrics) == ('classification', ['top1'])
    assert request.bits == [(4, 4), (3, 4)]
    assert request.work_dir == Path('work_dirs/vit_cells')
    # Figures of dev are for choosing settings: they stay out of the published rows.
    assert request.output == Path('work_dirs/vit_cells/vit_cells.jsonl')
    assert read(config, 'fp32.pth', '--split', 'test').output == Path('results/vit_cells.jsonl')


def test_runs_carry_what_was_said(config: str) -> None:
    request = read(config, 'fp32.pth', '--benchmark', 'cells', '--bits', '4', '--seeds', '1', '--options', 'a.b=c=d')
    (run,) = request.runs(['rtn'], [''])
    assert (run.benchmark, run.seed, run.bits) == ('cells', 1, (4, 4))
    assert 'a.b=c=d' in run.text
    assert run.model == '', 'the name of the config decides'
    (named,) = read(config, 'fp32.pth', '--bits', '4', '--model', 'vit').runs(['rtn'], [''])
    assert (
        named.model == 'vit' and named.command == read(config, 'fp32.pth', '--bits', '4').runs(['rtn'], [''])[0].command
    )


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--options', 'amp'], 'wants KEY=VALUE, got amp'),
        (['--bits', 'four'], 'four'),
        (['--bits', '9'], '9'),
    ],
)
def test_wrong_arguments_are_named(config: str, arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(config, 'fp32.pth', *arguments)


def test_data_root_has_to_be_said(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv('GPLQ_DATA_ROOT')
    with pytest.raises(ResultError, match='GPLQ_DATA_ROOT=PATH'):
        read(config, 'fp32.pth')


def test_a_variant_of_what_is_no_dict_is_refused(config: str) -> None:
    Path(config).write_text(CONFIG.replace("GPLQHook'", "GPLQHook', recipe='w4a4'"))
    with pytest.raises(
        ResultError, match=r'gplq_vit_cells.py .* do not take .*recipe\..* write such a setting as dict'
    ):
        read(config, 'fp32.pth').runs(['gplq'], ['', 'folded'])


@pytest.mark.parametrize('options', [[], ['--options', 'default_hooks.gplq.mimicking=10']])
def test_a_variant_that_changes_nothing_is_refused(config: str, options: list[str]) -> None:
    """By its name the table would tell apart what is the same."""
    if not options:
        Path(config).write_text(CONFIG.replace("GPLQHook'", "GPLQHook', mimicking=10, iterations=7"))
    request = read(config, 'fp32.pth', *options)
    with pytest.raises(ResultError, match=r"'mimicking 10': .*gplq_vit_cells.py has these settings already"):
        request.runs(['gplq'], ['', 'mimicking 10'])
    assert len(request.runs(['gplq'], ['', 'PCA 30 %', '1 epoch'])) == 2 * 3
    assert request.runs(['rtn'], ['', 'mimicking 10'])
