"""What holds for the repository as a whole."""

from __future__ import annotations

import configparser
from pathlib import Path

ROOT = Path(__file__).parents[1]


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / 'setup.cfg', encoding='utf-8')
    return parser


def packages_in(folder: str, name: str) -> set[str]:
    return {
        '.'.join([name, *path.parent.relative_to(ROOT / folder).parts]) for path in (ROOT / folder).rglob('__init__.py')
    }


def test_a_wheel_holds_every_package() -> None:
    listed = setup_cfg()['options']['packages'].split()
    assert set(listed) == packages_in('gplq', 'gplq') | packages_in('plugins', 'gplq.plugins')
    assert listed == sorted(listed)


def test_no_code_lies_outside_a_package() -> None:
    for folder in ('gplq', 'plugins'):
        for path in (ROOT / folder).rglob('*.py'):
            assert (path.parent / '__init__.py').is_file(), f'{path.parent} has no __init__.py'


def test_test_folders_are_no_packages() -> None:
    """`tests/gplq/__init__.py` would shadow the real gplq."""
    assert not list((ROOT / 'tests').rglob('__init__.py'))
