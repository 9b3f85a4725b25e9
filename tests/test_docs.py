"""What the documentation points to is there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_promise_about_bad_input_has_its_test() -> None:
    rows = [line for line in (ROOT / 'docs' / 'bad-input.md').read_text().splitlines() if line.startswith('| ')]
    named = [re.findall(r'`(test_\w+)` \|$', row) for row in rows if '**' not in row and '| test |' not in row]
    assert len(named) > 25 and all(len(names) == 1 for names in named)
    tests = '\n'.join(path.read_text() for path in (ROOT / 'tests').rglob('test_*.py'))
    missing = [name for (name,) in named if f'def {name}(' not in tests]
    assert not missing


def test_links_between_pages_resolve() -> None:
    for page in [ROOT / 'README.md', *ROOT.glob('docs/*.md'), ROOT / 'tools' / 'README.md']:
        for target in re.findall(r'\]\((?!https?:)([^)#]+)', page.read_text()):
            assert (page.parent / target).exists(), f'{page.name}: {target}'
