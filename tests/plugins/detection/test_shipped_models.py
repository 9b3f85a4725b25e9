"""Detectors that mmdet ships, shrunk, train and predict on the operators at hand."""

from __future__ import annotations

from typing import Any

import gplq.plugins.detection  # noqa: F401  isort: skip
import pytest
import torch
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.hub import get_config

FEW_PROPOSALS = {'nms_pre': 50, 'max_per_img': 20}
SHRUNK: dict[str, dict[str, Any]] = {
    'swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py': {
        'backbone.embed_dims': 24,
        'backbone.depths': [1, 1, 1, 1],
        'neck.in_channels': [24, 48, 96, 192],
        'train_cfg.rpn_proposal': {**FEW_PROPOSALS, 'nms': {'type': 'nms', 'iou_threshold': 0.7}},
        'test_cfg.rpn.max_per_img': 20,
    },
    'pvt/retinanet_pvt-t_fpn_1x_coco.py': {
        'backbone.num_layers': [1, 1, 1, 1],
        'backbone.embed_dims': 16,
        'neck.in_channels': [16, 32, 80, 128],
        'bbox_head.stacked_convs': 1,
    },
    'dino/dino-5scale_swin-l_8xb2-12e_coco.py': {
        'num_queries': 10,
        'backbone.embed_dims': 24,
        'backbone.depths': [1, 1, 1, 1],
        'backbone.num_heads': [1, 2, 4, 8],
        'neck.in_channels': [24, 48, 96, 192],
        'encoder.num_layers': 1,
        'decoder.num_layers': 2,
        'test_cfg.max_per_img': 10,
    },
}


def shrunk(name: str) -> Config:
    cfg = get_config(f'mmdet::{name}')
    cfg.merge_from_dict({f'model.{key}': value for key, value in SHRUNK[name].items()})
    cfg.model.backbone.init_cfg = None
    return cfg


@pytest.mark.parametrize('name', sorted(SHRUNK))
def test_shipped_model_trains_and_predicts(name: str) -> None:
    register_all_modules()
    torch.manual_seed(0)
    model = MODELS.build(shrunk(name).model)
    model.init_weights()  # mmdet leaves some parameters, DINO's level embedding among them, unset until then
    inputs = demo_mm_inputs(1, [[3, 64, 64]], num_items=[2], with_mask='mask' in name)
    losses, _ = model.parse_losses(model(**model.data_preprocessor(inputs, True), mode='loss'))
    losses.backward()
    assert losses.isfinite()
    gradient = next(p.grad for n, p in model.named_parameters() if n.startswith('backbone') and n.endswith('weight'))
    assert gradient.abs().sum() > 0
    model.eval()
    with torch.no_grad():
        inputs = demo_mm_inputs(1, [[3, 64, 64]], num_items=[2], with_mask='mask' in name)
        (result,) = model(**model.data_preprocessor(inputs, False), mode='predict')
    boxes = result.pred_instances.bboxes
    assert boxes.shape[1] == 4
    assert boxes.isfinite().all()
