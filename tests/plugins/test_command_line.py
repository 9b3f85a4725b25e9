"""Errors of a program are one line, wherever they come from."""

from __future__ import annotations

import pytest
from torch.utils.data import DataLoader

from gplq.errors import DataError
from gplq.plugins.command_line import exit_on_error
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
