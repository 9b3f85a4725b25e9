"""The matrix of methods and bits end to end, on a detector of two blocks."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gplq.plugins.results import read_rows

ROOT = Path(__file__).parents[2]
HOOK = """
_base_ = '{base}'
default_hooks = dict(
    gplq=dict(type='gplq.plugins.GPLQHook', iterations=2, search=dict(candidates=5, rounds=1, images=2)),
)
val_dataloader = dict(dataset=dict(data_root='data'))
"""


@pytest.fixture
def project(tiny_detector_config: Path, tiny_detector_checkpoint: Path, shapes_root: Path, tmp_path: Path) -> Path:
    """A folder with a config that has the two lines, data with a dev split, and an FP32 checkpoint."""
    (tmp_path / 'gplq_tiny.py').write_text(HOOK.format(base=tiny_detector_config))
    (tmp_path / 'data').mkdir()
    for entry in shapes_root.iterdir():
        (tmp_path / 'data' / entry.name).symlink_to(entry)
    shutil.copy(shapes_root / 'annotations/val.json', tmp_path / 'data/dev.json')
    (tmp_path / 'tools').symlink_to(ROOT / 'tools')
    return tmp_path


def compare(project: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, 'tools/compare.py', 'gplq_tiny.py', 'fp32.pth', '--benchmark', 'tiny', *options]
    settings = {**os.environ, 'GPLQ_DATA_ROOT': 'data'}
    return subprocess.run(command, capture_output=True, text=True, cwd=project, timeout=600, env=settings)


def test_a_matrix_is_measured_once_and_shown_as_table_csv_and_plot(project: Path) -> None:
    options = ['--methods', 'rtn', 'gplq', '--bits', 'W6A6', '--stages', '', 'searched']
    done = compare(project, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [row for row in read_rows(project / 'work_dirs/tiny/tiny.jsonl') if row.metric == 'bbox_mAP']
    found = [(row.method, row.variant, row.weight_bits, row.activation_bits) for row in rows]
    assert found == [
        ('fp32', '', 32, 32),
        ('rtn', '', 6, 6),
        ('gplq', '', 32, 6),
        ('gplq', '', 6, 6),
        ('gplq', 'searched', 6, 6),
    ]
    # One activation stage for both, whose minutes the second has as well.
    assert rows[4].minutes > rows[2].minutes
    page = (project / 'work_dirs/tiny/compare_dev.md').read_text()
    assert '- `gplq searched`: ' in page and '`weight_scheme=searched`' in page
    assert page.count('| W6A6 |') == 3
    with (project / 'work_dirs/tiny/compare_dev.csv').open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 5 and all(float(line['bbox_mAP']) >= 0 for line in lines)
    assert (project / 'work_dirs/tiny/compare_dev.png').stat().st_size > 1000

    again = compare(project, *options)
    assert again.returncode == 0, again.stderr
    assert '4 runs, 4 of them done already' in again.stdout
    assert [row for row in read_rows(project / 'work_dirs/tiny/tiny.jsonl') if row.metric == 'bbox_mAP'] == rows


def test_where_every_run_fails_their_reasons_are_the_answer(project: Path) -> None:
    (project / 'data/dev.json').unlink()
    done = compare(project, '--methods', 'rtn', '--bits', 'W6A6')
    assert done.returncode == 2 and 'Traceback' not in done.stderr
    assert '2 runs failed' in done.stderr and 'data/dev.json (val_dataloader) does not exist' in done.stderr
