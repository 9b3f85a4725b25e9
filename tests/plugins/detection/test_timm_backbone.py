from __future__ import annotations

import pytest
import torch

from gplq.plugins.detection import TimmBackbone

SWIN = dict(img_size=64, window_size=4, embed_dim=24, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8))


def test_swin_gives_channels_first_at_four_strides() -> None:
    backbone = TimmBackbone('swin_tiny_patch4_window7_224', model_args=SWIN)
    maps = backbone(torch.rand(2, 3, 64, 64))
    assert [tuple(m.shape) for m in maps] == [(2, 24, 16, 16), (2, 48, 8, 8), (2, 96, 4, 4), (2, 192, 2, 2)]
    assert backbone.channels == [24, 48, 96, 192]


def test_swin_maps_are_transposed_and_not_reshaped() -> None:
    backbone = TimmBackbone('swin_tiny_patch4_window7_224', out_indices=(1,), model_args=SWIN).eval()
    x = torch.rand(1, 3, 64, 64)
    raw = backbone.model(x)[0]
    assert tuple(raw.shape) == (1, 8, 8, 48)
    assert torch.equal(backbone(x)[0][0, :, 2, 5], raw[0, 2, 5])


def test_map_as_wide_as_it_has_channels_is_not_taken_for_channels_first() -> None:
    # At 96 x 96 the first stage of width 24 gives 24 x 24 x 24.
    settings = {**SWIN, 'img_size': 96, 'depths': (1, 1, 1, 1)}
    backbone = TimmBackbone('swin_tiny_patch4_window7_224', out_indices=(0,), model_args=settings).eval()
    x = torch.rand(1, 3, 96, 96)
    assert torch.equal(backbone(x)[0][0, :, 2, 5], backbone.model(x)[0][0, 2, 5])


def test_plain_vit_at_another_size() -> None:
    settings = dict(img_size=64, depth=2, embed_dim=24, num_heads=3, dynamic_img_size=True)
    backbone = TimmBackbone('vit_tiny_patch16_224', out_indices=(1,), model_args=settings)
    (feature_map,) = backbone(torch.rand(1, 3, 96, 64))
    assert tuple(feature_map.shape) == (1, 24, 6, 4)


def test_unknown_model_is_named_with_neighbors() -> None:
    with pytest.raises(ValueError, match="no model 'swin_huge'.*swin"):
        TimmBackbone('swin_huge')
