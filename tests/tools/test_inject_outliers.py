"""Outlier channels put into a classifier's checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.registry import MODELS


def test_a_classifier_keeps_its_function(
    classifier: tuple[Path, Path], run: Callable[..., str], tmp_path: Path
) -> None:
    config, checkpoint = classifier
    twin = tmp_path / 'twin.pth'
    assert '12 outlier channels in 4 LayerNorms' in run('inject_outliers.py', config, checkpoint, twin)
    model = MODELS.build(Config.fromfile(config).model).eval()
    norm = model.backbone.blocks[0].norm1
    images = torch.randn(2, 3, 16, 16)
    outputs, sizes = [], []
    for path in (checkpoint, twin):
        model.load_state_dict(torch.load(path, weights_only=True)['state_dict'])
        outputs.append(model.head(model.backbone(images)))
        sizes.append(norm.weight.abs().sort().values[-3:])
    assert torch.equal(*outputs)
    assert torch.equal(sizes[1] / sizes[0], torch.tensor([16.0, 32.0, 64.0]))


def test_a_model_without_a_backbone_is_named(run: Callable[..., str], tmp_path: Path) -> None:
    config = tmp_path / 'a.py'
    config.write_text("model = dict(type='torch.nn.Linear', in_features=2, out_features=2)")
    torch.save({'state_dict': torch.nn.Linear(2, 2).state_dict()}, tmp_path / 'a.pth')
    told = run('inject_outliers.py', config, tmp_path / 'a.pth', tmp_path / 'b.pth', code=2)
    assert "error: part='backbone': Linear has []" in told
