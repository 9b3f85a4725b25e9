"""One number for what a run was told, whatever the place of its data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from mmengine.config import Config

from gplq.plugins.settings_hash import settings_hash


def config(root: Path, **more: Any) -> Config:
    data = dict(data_root=str(root), ann_file=f'{root}/dev.json', mean=(1.0, 2.0))
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
    (data / 'images.txt').write_text('one and two')
    assert settings_hash(config(data), str(data)) != before
