"""Errors of a program are one line, wherever they come from."""

from __future__ import annotations

import argparse

import pytest
from torch.utils.data import DataLoader

from gplq.errors import DataError
from gplq.plugins.command_line import add_run_arguments, exit_on_error
from gplq.plugins.hooks.replay_data import Draw, ReplayDataset


class Broken:
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> float:
        raise OSError('not an image')


@pytest.mark.parametrize('workers', [0, 1])
def test_a_sample_that_cannot_be_read(workers: int, capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        list(DataLoader(ReplayDataset(Broken()), batch_sampler=[[Draw(0, 0)]], num_workers=workers))

    with pytest.raises(DataError):
        main()
    with pytest.raises(SystemExit) as ended:
        exit_on_error(main)
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith('error: sample 0 (Broken) cannot be read: OSError: not an image; mend it')
    assert 'Traceback' not in told


@pytest.mark.parametrize('option', ['custom_hooks=[dict(type="EMAHook",momentum=0.1)]', 'optim_wrapper.optimizer.lr'])
def test_options_that_mmengine_cannot_read(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    add_run_arguments(parser)
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(['--cfg-options', option])
    assert ended.value.code == 2
    assert f'error: --cfg-options {option}: cannot be read' in capsys.readouterr().err
    parsed = parser.parse_args(['--cfg-options', 'a=[1, 2]', 'b.c=x', 'd=a path/of two', 'e= 3', "f='none'"])
    assert parsed.cfg_options == {'a': [1, 2], 'b.c': 'x', 'd': 'a path/of two', 'e': 3, 'f': 'none'}
