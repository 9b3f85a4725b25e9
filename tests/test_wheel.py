"""A wheel works from the folder of another project."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]

PROGRAM = """
import sys
import gplq, gplq.plugins, gplq.plugins.results
import plugins
assert plugins.__file__.endswith('project/plugins/__init__.py'), plugins.__file__
print(gplq.__file__, gplq.plugins.__file__, sep='\\n')
"""


def test_wheel_is_whole_and_leaves_other_plugins_alone(tmp_path: Path) -> None:
    source = tmp_path / 'source'
    for folder in ('gplq', 'plugins'):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns('__pycache__'))
    for name in ('setup.cfg', 'pyproject.toml', 'README.md', 'LICENSE'):
        shutil.copy(ROOT / name, source / name)
    pip = [
        sys.executable,
        '-m',
        'pip',
        'wheel',
        '--quiet',
        '--no-deps',
        '--no-build-isolation',
        '-w',
        tmp_path,
        source,
    ]
    subprocess.run(pip, check=True, timeout=120)
    (wheel,) = tmp_path.glob('gplq-*.whl')
    installed = tmp_path / 'installed'
    with zipfile.ZipFile(wheel) as archive:
        assert {name.split('/')[0].split('-')[0] for name in archive.namelist()} == {'gplq'}
        archive.extractall(installed)
    (tmp_path / 'project/plugins').mkdir(parents=True)
    (tmp_path / 'project/plugins/__init__.py').touch()
    done = subprocess.run(
        [sys.executable, '-c', PROGRAM],
        cwd=tmp_path / 'project',
        env=os.environ | dict(PYTHONPATH=str(installed)),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        str(installed / 'gplq/__init__.py'),
        str(installed / 'gplq/plugins/__init__.py'),
    ]
