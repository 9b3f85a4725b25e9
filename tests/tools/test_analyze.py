"""The analysis of a small classifier, from FP32 weights and from a quantized checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


def test_page_table_and_sensitivities(classifier: tuple[Path, Path], run: Callable[..., str], tmp_path: Path) -> None:
    config, checkpoint = classifier
    out = tmp_path / 'analysis'
    run('analyze.py', config, checkpoint, '--bits', 'w3a3', '--sensitivity', '--work-dir', out)
    page = (out / 'analysis.html').read_text()
    assert page.count('<title>lost') == 3, 'the patch embedding and two blocks; the head is outside of the part'
    table = (out / 'analysis.md').read_text()
    assert '| gplq_toy | backbone.blocks.1.attn:0:query | query | 3 |' in table
    assert '| gplq_toy | backbone.blocks.0.mlp.fc1 | weight | 3 |' in table

    run('train.py', config, '--work-dir', tmp_path / 'run', '--cfg-options', f'load_from={checkpoint}')
    quantized = tmp_path / 'run' / 'gplq_w4a4.pth'
    run('analyze.py', config, quantized, '--beside', config, checkpoint, '--work-dir', tmp_path / 'after')
    table = (tmp_path / 'after' / 'analysis.md').read_text()
    assert table.count('| backbone.blocks.0.mlp.fc1 | weight | 4 |') == 2
    assert 'is quantized, this needs a model that is calibrated' in run(
        'analyze.py', config, quantized, '--sensitivity', '--work-dir', tmp_path / 'refused', code=2
    )
