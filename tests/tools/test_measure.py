"""What a search and a step cost, measured on a detector of two blocks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from gplq.plugins.results import ResultRow, read_rows

ROOT = Path(__file__).parents[2]
HOOK = """
_base_ = '{base}'
default_hooks = dict(
    gplq=dict(type='gplq.plugins.GPLQHook', search=dict(candidates=5, rounds=1, images=2, memory_mb=64)),
)
load_from = 'fp32.pth'
"""


@pytest.fixture
def config(tiny_detector_config: Path, tiny_detector_checkpoint: Path, tmp_path: Path) -> Path:
    path = tmp_path / 'gplq_tiny.py'
    path.write_text(HOOK.format(base=tiny_detector_config))
    return path


def measured(config: Path, tool: str, *options: str) -> list[ResultRow]:
    command = [sys.executable, ROOT / 'tools' / tool, config.name, '--output', 'rows.jsonl', *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=config.parent, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return read_rows(config.parent / 'rows.jsonl')


def test_a_search_is_measured_in_passes_and_memory(config: Path) -> None:
    rows = measured(config, 'measure_search.py', '--passes', '1')
    found = {row.metric: row.value for row in rows}
    assert set(found) == {'pass_seconds', 'search_seconds', 'passes', 'search_mb', 'gradient_mb'}
    # Calibration and rounding are counted, too.
    assert found['passes'] * found['pass_seconds'] == pytest.approx(60 * rows[0].minutes)
    assert found['passes'] * found['pass_seconds'] > found['search_seconds'] > 0
    assert rows[0].calibration_samples == 2
    assert 0 < found['search_mb'] < 64 + 2 * found['gradient_mb']


def test_steps_of_both_are_measured(config: Path) -> None:
    rows = measured(config, 'measure_step.py', '--steps', '1')
    ratios = {row.method: row.value for row in rows if row.metric == 'step_ratio'}
    assert ratios['fp32'] == 1.0 and ratios['gplq'] > 0
