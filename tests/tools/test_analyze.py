"""The analysis of a small classifier, from FP32 weights and from a quantized checkpoint."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

TOOLS = Path(__file__).parents[2] / 'tools'
CONFIG = """
custom_imports = dict(imports=['gplq.plugins.fgvc'])
default_scope = 'mmengine'
model = dict(
    type='gplq.plugins.fgvc.TimmClassifier', model_name='vit_tiny_patch16_224', num_classes=2,
    model_args=dict(img_size=16, patch_size=4, embed_dim=12, depth=2, num_heads=2))
pipeline = [
    dict(type='gplq.plugins.fgvc.LoadImage'),
    dict(type='gplq.plugins.fgvc.TimmTransform', input_size=(3, 16, 16), is_training=False),
    dict(type='gplq.plugins.fgvc.PackImage')]
data = dict(type='gplq.plugins.fgvc.TorchvisionDataset', name='ImageFolder', data_root={root!r}, pipeline=pipeline)
train_dataloader = dict(batch_size=4, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=True), dataset=data)
val_dataloader = dict(batch_size=4, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False), dataset=data)
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=1)
val_cfg = dict(type='ValLoop')
val_evaluator = dict(type='gplq.plugins.fgvc.ClassificationMetric')
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-3))
default_hooks = dict(gplq=dict(type='gplq.plugins.GPLQHook', weight_bits=4, activation_bits=4, iterations=1))
"""


@pytest.fixture
def classifier(tmp_path: Path) -> tuple[Path, Path]:
    """A config and an FP32 checkpoint."""
    from mmengine.config import Config
    from mmengine.registry import MODELS

    for number in range(8):
        folder = tmp_path / 'images' / 'train' / f'class{number % 2}'
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f'{number}.png')
    config = tmp_path / 'gplq_toy.py'
    config.write_text(CONFIG.format(root=str(tmp_path / 'images' / 'train')))
    torch.manual_seed(0)
    model = MODELS.build(Config.fromfile(config).model)
    torch.save({'state_dict': model.state_dict()}, tmp_path / 'fp32.pth')
    return config, tmp_path / 'fp32.pth'


def run(tool: str, *arguments: object, code: int = 0) -> str:
    command = [sys.executable, str(TOOLS / tool), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


def test_page_table_and_sensitivities(classifier: tuple[Path, Path], tmp_path: Path) -> None:
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
