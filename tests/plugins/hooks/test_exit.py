"""How tools/train.py ends: with code 2 and one line where the input is at fault, and with 0 otherwise."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from mmengine.config import Config

TRAIN = Path(__file__).parents[3] / 'tools/train.py'


def tool(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int | str | None:
    """Run the program in this process; returns its exit code."""
    monkeypatch.setattr(sys, 'argv', [str(TRAIN), *arguments])
    try:
        runpy.run_path(str(TRAIN), run_name='__main__')
    except SystemExit as ended:
        return ended.code
    return 0


@pytest.fixture
def path(make_config: Callable[..., Config], tmp_path: Path) -> str:
    config = make_config()
    config.dump(str(tmp_path / 'toy_config.py'))
    return str(tmp_path / 'toy_config.py')


@pytest.mark.parametrize(
    ('option', 'message'),
    [
        ('load_from=None', 'nothing is loaded into the model'),
        ('default_hooks.gplq.weight_bits=9', 'weight_bits=9'),
        ('default_hooks.gplq.targets=[backbon]', "pattern 'backbon' matches nothing; similar names: ['backbone'"),
        ('default_hooks.gplq.stage.lr=1e30', 'of iteration 1 is'),
    ],
)
def test_one_line_and_code_2(
    option: str, message: str, path: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool(monkeypatch, path, '--cfg-options', option, 'experiment_name=' + option) == 2
    output = capsys.readouterr().err
    errors = [line for line in output.splitlines() if line.startswith('error: ')]
    assert len(errors) == 1 and message in errors[0]
    assert 'Traceback' not in output


def test_code_0(path: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert tool(monkeypatch, path, '--work-dir', str(tmp_path / 'other')) == 0
    assert (tmp_path / 'other/gplq_w4a4.safetensors').is_file()
    # What the run left can be resumed by nobody: it is done, and says so.
    assert tool(monkeypatch, path, '--work-dir', str(tmp_path / 'empty'), '--resume') == 2
