from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from gplq.plugins.checkpoint_file import read_checkpoint, write_checkpoint
from gplq.plugins.results import file_sha256


def test_the_same_content_is_the_same_file_whatever_its_name(tmp_path: Path) -> None:
    def content() -> dict[str, Any]:
        return {'state_dict': {'weight': torch.arange(6.0).reshape(2, 3)}}

    first, second = tmp_path / 'first.pth', tmp_path / 'folder/second.pth'
    for path in (first, second):
        write_checkpoint(str(path), content())
    assert file_sha256(first) == file_sha256(second)
    assert torch.equal(read_checkpoint(str(second))['state_dict']['weight'], content()['state_dict']['weight'])
    assert [path.name for path in second.parent.iterdir()] == ['second.pth']
