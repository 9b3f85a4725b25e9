from __future__ import annotations

import pytest
from mmdet.registry import MODELS
from torch import nn

from gplq.plugins import detection


@pytest.mark.parametrize('name', ['ViT', 'SimpleFPN', 'LN2d'])
def test_names_stay_free_for_mmdets_vitdet_project(name: str) -> None:
    # projects/ViTDet registers these three; registering a name twice raises.
    theirs = type(name, (nn.Module,), {})
    MODELS.register_module(module=theirs)
    try:
        assert MODELS.get(name) is theirs
        assert MODELS.get(f'gplq.plugins.detection.{name}') is getattr(detection, name)
    finally:
        del MODELS.module_dict[name]
