"""Small data and a small detector, for every test that runs a real Runner."""

from __future__ import annotations

from pathlib import Path

import pytest

CONFIGS = Path(__file__).parents[1] / 'configs'

TINY_DETECTOR = """
_base_ = {base!r}

data_root = {root!r}
metainfo = dict(classes={classes!r})
model = dict(
    backbone=dict(
        img_size=64,
        pretrain_img_size=64,
        embed_dim=24,
        depth=2,
        window_size=4,
        window_block_indexes=[0],
        init_cfg=None,
    ),
    neck=dict(in_channels=24, out_channels=16),
    rpn_head=dict(in_channels=16, feat_channels=16),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=16),
        bbox_head=dict(in_channels=16, fc_out_channels=32, num_classes={count}),
        mask_roi_extractor=dict(out_channels=16),
        mask_head=dict(in_channels=16, conv_out_channels=16, num_classes={count}),
    ),
    # A detector this fresh is sure of nothing, and something should come out of it.
    test_cfg=dict(rpn=dict(nms_pre=50, max_per_img=20), rcnn=dict(score_thr=0.0, max_per_img=10)),
)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='PackDetInputs'),
]
train_dataloader = dict(
    batch_size=2,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        data_root=data_root,
        metainfo=metainfo,
        ann_file='annotations/train.json',
        data_prefix=dict(img='train/'),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=2,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        data_root=data_root, metainfo=metainfo, ann_file='annotations/val.json', data_prefix=dict(img='val/')
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + '/annotations/val.json')
test_evaluator = val_evaluator
train_cfg = dict(max_epochs=2, val_interval=2)
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval=1, max_keep_ckpts=2))
"""


@pytest.fixture(scope='session')
def shapes_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set in COCO's format with masks: four images for training and two to validate on, 64 x 64."""
    from gplq.plugins.detection.shapes import ShapesSettings, write_split

    root = tmp_path_factory.mktemp('shapes')
    settings = ShapesSettings(size=64, max_radius=16)
    write_split(root, 'train', 4, settings)
    write_split(root, 'val', 2, settings)
    return root


@pytest.fixture
def tiny_detector_config(shapes_root: Path, tmp_path: Path) -> Path:
    """A config that trains a Mask R-CNN on a ViT of two blocks, windowed and global, for two epochs."""
    from gplq.plugins.detection.shapes import CLASSES

    path = tmp_path / 'tiny.py'
    base = str(CONFIGS / 'mask_rcnn_vit-tiny_nuclei.py')
    text = TINY_DETECTOR.format(base=base, root=str(shapes_root), classes=CLASSES, count=len(CLASSES))
    path.write_text(text, encoding='utf-8')
    return path


@pytest.fixture
def tiny_detector_checkpoint(tiny_detector_config: Path, tmp_path: Path) -> Path:
    """Fresh FP32 weights of that detector, `fp32.pth` beside its config."""
    import gplq.plugins.detection  # noqa: F401  isort: skip
    import torch
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules
    from mmengine.config import Config
    from mmengine.registry import init_default_scope

    cfg = Config.fromfile(tiny_detector_config)
    init_default_scope('mmdet')
    register_all_modules()
    torch.manual_seed(0)
    path = tmp_path / 'fp32.pth'
    torch.save({'state_dict': MODELS.build(cfg.model).state_dict()}, path)
    return path
