"""Checkpoints at an address, served by this machine."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from mmengine.runner import CheckpointLoader

from gplq.errors import CheckpointError
from gplq.plugins.downloads import read_downloads_safely


class Foreign:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path('executed'),))


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))
    for name in ('http_proxy', 'HTTP_PROXY'):
        monkeypatch.delenv(name, raising=False)
    read_downloads_safely()
    (tmp_path / 'served').mkdir()
    handler = functools.partial(Quiet, directory=str(tmp_path / 'served'))
    with ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{server.server_port}'
        server.shutdown()


def test_a_checkpoint_is_downloaded_once_and_read(address: str) -> None:
    torch.save({'state_dict': {'weight': torch.ones(2)}}, 'served/model.pth')
    read = CheckpointLoader.load_checkpoint(f'{address}/model.pth', map_location='cpu')
    assert read['state_dict']['weight'].tolist() == [1, 1]
    Path('served/model.pth').unlink()
    again = CheckpointLoader.load_checkpoint(f'{address}/model.pth', map_location='cpu')
    assert again['state_dict']['weight'].tolist() == [1, 1]


def test_foreign_objects_are_refused_and_not_executed(address: str) -> None:
    torch.save({'state_dict': {}, 'x': Foreign()}, 'served/evil.pth')
    with pytest.raises(CheckpointError, match=r'objects that are not data, such as pathlib\S*, and was not read'):
        CheckpointLoader.load_checkpoint(f'{address}/evil.pth', map_location='cpu')
    assert not Path('executed').exists()


def test_what_is_not_there_is_named(address: str) -> None:
    with pytest.raises(CheckpointError, match=r'none.pth cannot be downloaded \(.*404.*give its path'):
        CheckpointLoader.load_checkpoint(f'{address}/none.pth', map_location='cpu')
