"""A small classifier, and the tools as a user starts them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
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


@pytest.fixture
def run() -> Callable[..., str]:
    """A tool with arguments and the exit status that it should have; gives what it printed."""

    def call(tool: str, *arguments: object, code: int = 0) -> str:
        command = [sys.executable, str(TOOLS / tool), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr

    return call
