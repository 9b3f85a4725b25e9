from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer, MessageHub

from gplq.plugins.safe_load import allow_mmengine_objects


class Foreign:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path('executed'),))


class Reacher:
    """Pickles as getattr(HistoryBuffer, '__init__'), the first step to the interpreter's internals."""

    def __reduce__(self) -> tuple:
        return (getattr, (HistoryBuffer, '__init__'))


@pytest.fixture(autouse=True)
def allowed() -> None:
    allow_mmengine_objects()


def test_message_hub_of_a_training_is_read_back(tmp_path: Path) -> None:
    hub = MessageHub.get_instance('safe_load')
    hub.update_scalars({'loss': 2.0, 'lr': np.float32(0.5)})
    hub.update_scalar('loss', torch.tensor(4.0))
    hub.update_info('iter', 7)
    torch.save({'message_hub': hub.state_dict(), 'numbers': np.arange(3)}, tmp_path / 'epoch_1.pth')
    checkpoint = torch.load(tmp_path / 'epoch_1.pth')
    assert checkpoint['message_hub']['log_scalars']['loss'].mean() == 3.0
    assert checkpoint['numbers'].tolist() == [0, 1, 2]


def test_foreign_objects_are_refused_and_not_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({'state_dict': {}, 'x': Foreign()}, 'foreign.pth')
    with pytest.raises(pickle.UnpicklingError):
        torch.load('foreign.pth')
    assert not Path('executed').exists()


def test_attribute_lookup_is_limited_to_the_statistics(tmp_path: Path) -> None:
    torch.save(Reacher(), tmp_path / 'reacher.pth')
    with pytest.raises(Exception, match="asks for '__init__'"):
        torch.load(tmp_path / 'reacher.pth')
