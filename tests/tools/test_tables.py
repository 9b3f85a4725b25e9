from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).parents[2] / 'tools' / 'tables.py'


def run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(TOOL), *args], capture_output=True, text=True, timeout=120)


def test_tables_of_this_repository_match_its_result_files() -> None:
    done = run('--check')
    assert done.returncode == 0, done.stdout + done.stderr


def test_check_finds_a_table_that_was_typed(tmp_path: Path) -> None:
    page = tmp_path / 'page.md'
    typed = '<!-- table: results/demo.jsonl metrics=bbox_mAP -->\n| gplq | 0.99 |\n<!-- /table -->\n'
    page.write_text(typed)
    done = run('--check', str(page))
    assert done.returncode == 1 and 'out of date' in done.stdout
    assert page.read_text() == typed
    assert run(str(page)).returncode == 0
    assert '0.99' not in page.read_text()
    assert run('--check', str(page)).returncode == 0


def test_a_page_with_a_table_that_is_never_closed_is_named_and_stays(tmp_path: Path) -> None:
    page = tmp_path / 'page.md'
    marker = '<!-- table: results/demo.jsonl metrics=bbox_mAP -->'
    text = f'{marker}\n\nText that must stay.\n\n{marker}\n<!-- /table -->\n'
    page.write_text(text)
    for arguments in (['--check'], []):
        done = run(*arguments, str(page))
        assert done.returncode == 1 and f'{page}: line 5, {marker}: the table of line 1 is open' in done.stderr
        assert 'Traceback' not in done.stderr and page.read_text() == text
