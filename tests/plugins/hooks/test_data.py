"""Which images the stages calibrate on."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner

from gplq.plugins.hooks.data import calibration_loader
from gplq.plugins.hooks.settings import HookSettings


def test_every_data_set_of_a_concatenation_is_calibrated_on(
    make_config: Callable[..., Config], toy: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    # mmengine concatenates data sets that can be loaded late.
    monkeypatch.setattr(toy.ToyImages, 'full_init', lambda self: None, raising=False)
    config = make_config()
    part = dict(config.train_dataloader.dataset)
    both = [dict(part, length=3, seed=7), dict(type='RepeatDataset', times=5, dataset=dict(part, length=2, seed=8))]
    config.train_dataloader.dataset = dict(type='ConcatDataset', datasets=both)
    loader = calibration_loader(Runner.from_cfg(config), HookSettings.from_config(), samples=100)
    images = torch.stack([image for batch in loader for image in batch['inputs']])
    # Three of the first and two of the second, once each.
    expected = [torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(s)) for n, s in ((3, 7), (2, 8))]
    bright = torch.cat([torch.arange(len(part)) % 4 for part in expected])
    wanted = torch.cat(expected)
    for image, label in zip(wanted, bright.tolist(), strict=True):
        image[:label] += 1.0
    assert sorted(image.sum().item() for image in images) == sorted(image.sum().item() for image in wanted)
