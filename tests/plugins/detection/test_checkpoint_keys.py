"""The published ViTDet checkpoint fits by name and shape; its names are spelled out by rule below."""

from __future__ import annotations

from pathlib import Path

import pytest
from mmengine.config import Config

import gplq.plugins.detection  # noqa: F401

from mmdet.registry import MODELS  # isort: skip
from mmdet.utils import register_all_modules  # isort: skip

CONFIGS = Path(__file__).parents[3] / 'configs'
WIDTH, HEAD, NECK = 768, 64, 256
GLOBAL_BLOCKS = (2, 5, 8, 11)

Shapes = dict[str, tuple[int, ...]]


def affine(name: str, *weight: int) -> Shapes:
    return {f'{name}.weight': weight, f'{name}.bias': weight[:1]}


def normed_conv(name: str, *weight: int) -> Shapes:
    return {f'{name}.conv.weight': weight, **affine(f'{name}.norm_layer', weight[0])}


def backbone() -> Shapes:
    shapes = {'backbone.pos_embed': (1, 1 + 14 * 14, WIDTH)}
    shapes |= affine('backbone.patch_embed.proj', WIDTH, 3, 16, 16)
    for index in range(12):
        block = f'backbone.blocks.{index}'
        # Windows of 14, or the 64 patches of a side of 1024 pixels; distances to both sides and zero.
        distances = 2 * (64 if index in GLOBAL_BLOCKS else 14) - 1
        shapes |= affine(f'{block}.norm1', WIDTH) | affine(f'{block}.norm2', WIDTH)
        shapes |= {f'{block}.attn.rel_pos_{axis}': (distances, HEAD) for axis in 'hw'}
        shapes |= affine(f'{block}.attn.qkv', 3 * WIDTH, WIDTH) | affine(f'{block}.attn.proj', WIDTH, WIDTH)
        shapes |= affine(f'{block}.mlp.fc1', 4 * WIDTH, WIDTH) | affine(f'{block}.mlp.fc2', WIDTH, 4 * WIDTH)
    return shapes


def transposed(name: str, inputs: int, outputs: int) -> Shapes:
    return {f'{name}.weight': (inputs, outputs, 2, 2), f'{name}.bias': (outputs,)}


def neck() -> Shapes:
    shapes = transposed('neck.fpn1.0', WIDTH, 384) | affine('neck.fpn1.1', 384)
    shapes |= transposed('neck.fpn1.3', 384, 192) | transposed('neck.fpn2.0', WIDTH, 384)
    for index, channels in enumerate((192, 384, WIDTH, WIDTH)):
        shapes |= normed_conv(f'neck.lateral_convs.{index}', NECK, channels, 1, 1)
        shapes |= normed_conv(f'neck.fpn_convs.{index}', NECK, NECK, 3, 3)
    return shapes


def heads() -> Shapes:
    shapes = affine('rpn_head.rpn_cls', 3, NECK, 1, 1) | affine('rpn_head.rpn_reg', 12, NECK, 1, 1)
    for index in range(2):
        shapes |= affine(f'rpn_head.rpn_conv.{index}.conv', NECK, NECK, 3, 3)
    box, mask = 'roi_head.bbox_head', 'roi_head.mask_head'
    for index in range(4):
        shapes |= normed_conv(f'{box}.shared_convs.{index}', NECK, NECK, 3, 3)
        shapes |= normed_conv(f'{mask}.convs.{index}', NECK, NECK, 3, 3)
    shapes |= affine(f'{box}.shared_fcs.0', 1024, NECK * 7 * 7)
    shapes |= affine(f'{box}.fc_cls', 81, 1024) | affine(f'{box}.fc_reg', 320, 1024)
    shapes |= transposed(f'{mask}.upsample', NECK, NECK) | affine(f'{mask}.conv_logits', 80, NECK, 1, 1)
    return shapes


@pytest.mark.parametrize('config', ['mask_rcnn_vit-b_coco.py', 'gplq_mask_rcnn_vit.py'])
def test_model_has_exactly_the_published_parameters(config: str) -> None:
    register_all_modules()
    model = MODELS.build(Config.fromfile(CONFIGS / config).model)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert shapes == backbone() | neck() | heads()
