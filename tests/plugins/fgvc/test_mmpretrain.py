"""mmpretrain's own classifiers under the same two lines; skipped where it is not installed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner

mmpretrain = pytest.importorskip('mmpretrain')

CUB = 'swin_transformer/swin-large_8xb8_cub-384px.py'
VIT = dict(
    type='VisionTransformer',
    arch=dict(embed_dims=24, num_layers=2, num_heads=3, feedforward_channels=48),
    img_size=384,
    patch_size=96,
)
SWIN = dict(arch=dict(embed_dims=12, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2]), init_cfg=None)
TIMM = dict(
    type='TIMMBackbone',
    model_name='vit_tiny_patch16_224',
    pretrained=False,
    features_only=True,
    img_size=384,
    patch_size=96,
    depth=3,
    embed_dim=24,
    num_heads=3,
)


@pytest.fixture
def scope() -> Iterator[None]:
    from mmengine.registry import DefaultScope

    yield
    DefaultScope.get_instance('mmengine', scope_name='mmengine')


def config_of(backbone: dict[str, Any], channels: int, cub_root: Path, work_dir: Path) -> Config:
    """mmpretrain's config for CUB with Swin-L, shrunk, on the miniature."""
    cfg = Config.fromfile(Path(mmpretrain.__file__).parent / '.mim' / 'configs' / CUB)
    if 'type' in backbone:
        cfg.model.backbone = backbone
        cfg.model.neck = None if backbone['type'] == 'VisionTransformer' else dict(type='GlobalAveragePooling')
    else:
        cfg.model.backbone.update(backbone)
    if backbone.get('type') == 'VisionTransformer':
        cfg.model.head = dict(type='VisionTransformerClsHead', num_classes=200, in_channels=channels)
    cfg.model.head.update(in_channels=channels)
    for split in ('train', 'val', 'test'):
        loader = cfg[f'{split}_dataloader']
        loader.dataset.data_root = str(cub_root)
        loader.update(batch_size=2, num_workers=0, persistent_workers=False)
    few = dict(calibration_samples=4, exponents=(0.0, 1.0), clips=(1.0,))
    stage = dict(pca_samples=4, rank=4)
    hook = dict(type='gplq.plugins.GPLQHook', weight_bits=4, activation_bits=4, iterations=2, recipe=few, stage=stage)
    cfg.default_hooks.gplq = hook
    cfg.work_dir, cfg.experiment_name = str(work_dir / 'run'), f'mmpretrain_{work_dir.name}'
    return cfg


@pytest.mark.usefixtures('scope')
@pytest.mark.parametrize(
    ('backbone', 'channels', 'products'), [(SWIN, 96, 8), (VIT, 24, 4), (TIMM, 24, 6)], ids=['swin', 'vit', 'timm']
)
def test_the_two_lines(backbone: dict[str, Any], channels: int, products: int, cub_root: Path, tmp_path: Path) -> None:
    from mmengine.registry import init_default_scope
    from mmpretrain.registry import MODELS

    from gplq.record import record_of

    cfg = config_of(backbone, channels, cub_root, tmp_path)
    init_default_scope('mmpretrain')
    torch.save({'state_dict': MODELS.build(cfg.model).state_dict()}, tmp_path / 'fp32.pth')
    cfg.load_from = str(tmp_path / 'fp32.pth')
    runner = Runner.from_cfg(cfg)
    runner.train()
    steps = json.loads((Path(runner.work_dir) / 'gplq.json').read_text())
    assert [step['step'] for step in steps] == ['FP32', 'W32A4', 'W4A4']
    assert 'accuracy/top1' in steps[0]['metrics']
    assert len(record_of(runner.model).plan.products) == products
