"""One number for what a run was told, whatever the place of its data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from mmengine.config import Config

from gplq.plugins.settings_hash import settings_hash


def config(root: Path | str, **more: Any) -> Config:
    data = dict(data_root=str(root), ann_file=f'{str(root).rstrip("/")}/dev.json', mean=(1.0, 2.0))
    return Config(dict(hook=dict(mimicking=1.0, type=dict), data=data, **more))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    root = tmp_path / 'data'
    root.mkdir()
    (root / 'images.txt').write_text('one')
    (root / 'image.jpg').write_text('pixels')
    return root


def test_the_place_of_the_data_does_not_matter(data: Path, tmp_path: Path) -> None:
    here = settings_hash(config(data), str(data))
    assert here == settings_hash(config(data), f'{data}/')
    assert here == settings_hash(config(f'{data}/'), f'{data}/')
    moved = data.rename(tmp_path / 'elsewhere')
    assert here == settings_hash(config(moved), str(moved))
    assert len(here) == 64


def test_settings_and_lists_do(data: Path) -> None:
    before = settings_hash(config(data), str(data))
    other = config(data)
    other.hook.mimicking = 10.0
    assert settings_hash(other, str(data)) != before
    (data / 'image.jpg').write_text('other pixels')
    assert settings_hash(config(data), str(data)) == before, 'no list'
    (data / 'images.txt').write_text('two')
    assert settings_hash(config(data), str(data)) != before, 'of the same size'


def test_weights_are_told_by_their_content(tmp_path: Path) -> None:
    teacher, start = tmp_path / 'teacher.pth', tmp_path / 'start.pth'

    def found() -> str:
        return settings_hash(config(tmp_path, checkpoint=str(teacher), load_from=str(start)), '')

    without = found()
    start.write_text('replaced by a run')
    assert found() == without
    teacher.write_text('one')
    one = found()
    teacher.write_text('two')
    assert len({without, one, found()}) == 3


def test_a_function_is_told_by_its_name() -> None:
    def function() -> None: ...

    same = function

    def other() -> None: ...

    found = [settings_hash(Config(dict(function=one)), '') for one in (function, same, other)]
    assert found[0] == found[1] != found[2]
