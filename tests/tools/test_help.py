"""Every tool is listed in tools/README.md and explains itself."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / 'tools'
SCRIPTS = sorted(path.name for path in TOOLS.glob('*.py'))


def test_readme_lists_every_tool_and_no_other() -> None:
    listed = re.findall(r'^\| `(\w+\.py)` \|', (TOOLS / 'README.md').read_text(encoding='utf-8'), re.MULTILINE)
    assert sorted(listed) == SCRIPTS


@pytest.mark.parametrize('script', SCRIPTS)
def test_help_shows_an_example(script: str, tmp_path: Path) -> None:
    command = [sys.executable, str(TOOLS / script), '--help']
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    assert f'python tools/{script}' in done.stdout
