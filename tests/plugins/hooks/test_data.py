"""Which images the stages calibrate on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.runner import Runner

from gplq.plugins.hooks.data import calibration_loader
from gplq.plugins.hooks.settings import HookSettings
from gplq.record import Stage, record_of


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


def test_annotations_follow_the_image_whether_steps_are_named_or_classes(tmp_path: Path) -> None:
    import gplq.plugins.detection  # noqa: F401  isort: skip
    from mmcv.transforms import LoadImageFromFile
    from mmdet.datasets import CocoDataset
    from mmdet.datasets.transforms import LoadAnnotations, PackDetInputs, Resize
    from mmengine.registry import init_default_scope

    from gplq.plugins.detection.shapes import CLASSES, ShapesSettings, write_split

    init_default_scope('mmdet')
    write_split(tmp_path, 'train', 1, ShapesSettings(size=64, max_radius=16))
    boxes = []
    for given in (lambda kind: kind, lambda kind: kind.__name__):
        pipeline = [
            dict(type=given(LoadImageFromFile)),
            dict(type=given(Resize), scale=(256, 256)),
            dict(type=given(LoadAnnotations), with_bbox=True),
            dict(type=given(PackDetInputs), meta_keys=()),
        ]
        dataset = dict(
            type=given(CocoDataset),
            data_root=str(tmp_path),
            metainfo=dict(classes=CLASSES),
            ann_file='annotations/train.json',
            data_prefix=dict(img='train/'),
            pipeline=pipeline,
        )
        loader = ConfigDict(batch_size=1, dataset=dataset)
        runner = SimpleNamespace(_train_dataloader=loader, _val_dataloader=loader, _test_dataloader=None)
        (batch,) = calibration_loader(runner, HookSettings.from_config(), samples=1)
        boxes.append(batch['data_samples'][0].gt_instances.bboxes.tensor)
    original = json.loads((tmp_path / 'annotations/train.json').read_text())['annotations'][0]['bbox']
    assert boxes[0][0, :2].tolist() == [4 * original[0], 4 * original[1]]
    assert torch.equal(boxes[0], boxes[1])


@pytest.mark.parametrize('built', [False, True])
def test_a_runner_made_without_a_config_calibrates_as_well(
    make_config: Callable[..., Config], toy: ModuleType, built: bool
) -> None:
    config = make_config()
    loader: Any = dict(config.train_dataloader)
    if built:
        loader = Runner.build_dataloader(loader)
    runner = Runner(
        model=toy.ToyClassifier(),
        work_dir=config.work_dir,
        train_dataloader=loader,
        train_cfg=dict(config.train_cfg),
        optim_wrapper=dict(config.optim_wrapper),
        default_hooks=dict(config.default_hooks),
        load_from=config.load_from,
        experiment_name=config.experiment_name,
    )
    runner.train()
    assert record_of(runner.model).stage is Stage.QUANTIZED
