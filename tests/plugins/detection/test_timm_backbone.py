from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from gplq.plugins.detection import TimmBackbone

SWIN = dict(img_size=64, window_size=4, embed_dim=24, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8))
VIT = dict(img_size=64, depth=2, embed_dim=24, num_heads=3)


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


def test_maps_are_normalized_over_channels_when_told() -> None:
    settings = dict(model_name='swin_tiny_patch4_window7_224', out_indices=(0, 2), model_args=SWIN)
    backbone = TimmBackbone(**settings, norm_outputs=True).eval()
    plain = TimmBackbone(**settings).eval()
    plain.model.load_state_dict(backbone.model.state_dict())
    assert not list(plain.norms)
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        backbone.norms[1].weight.fill_(2.0)
        backbone.norms[1].bias.fill_(0.5)
        (first, second), (raw, other) = backbone(x), plain(x)
    spread = (raw - raw.mean(1, keepdim=True)) / raw.std(1, keepdim=True, unbiased=False)
    assert torch.allclose(first, spread, atol=1e-4)
    spread = (other - other.mean(1, keepdim=True)) / other.std(1, keepdim=True, unbiased=False)
    assert torch.allclose(second, 2 * spread + 0.5, atol=1e-4)


def test_unknown_model_is_named_with_neighbors() -> None:
    with pytest.raises(ValueError, match="no model 'swin_huge'.*swin"):
        TimmBackbone('swin_huge')


def saved_swin(path: Path, **changed: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    classifier = timm.create_model('swin_tiny_patch4_window7_224', num_classes=3, **{**SWIN, **changed})
    save_file(classifier.state_dict(), path)
    return classifier.state_dict()


def test_weights_of_a_classifier_in_a_file_are_read_when_the_weights_are_initialized(tmp_path: Path) -> None:
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'swin.safetensors'))
    # There is no such file yet.
    backbone = TimmBackbone('swin_tiny_patch4_window7_224', model_args=SWIN, init_cfg=init_cfg)
    state = saved_swin(tmp_path / 'swin.safetensors')
    backbone.init_weights()
    loaded = backbone.model.state_dict()
    assert torch.equal(loaded['layers_2.blocks.1.mlp.fc1.weight'], state['layers.2.blocks.1.mlp.fc1.weight'])
    assert torch.equal(loaded['patch_embed.proj.weight'], state['patch_embed.proj.weight'])


def test_biases_of_other_windows_are_resized_as_timm_does(tmp_path: Path) -> None:
    path = tmp_path / 'swin.safetensors'
    saved_swin(path)
    larger = {**SWIN, 'img_size': 128, 'window_size': 8}
    init_cfg = dict(type='Pretrained', checkpoint=str(path))
    backbone = TimmBackbone('swin_tiny_patch4_window7_224', model_args=larger, init_cfg=init_cfg)
    backbone.init_weights()
    by_timm = timm.create_model(
        'swin_tiny_patch4_window7_224',
        features_only=True,
        pretrained=True,
        pretrained_cfg_overlay=dict(file=str(path), num_classes=3),
        **larger,
    )
    expected = by_timm.state_dict()
    assert tuple(expected['layers_0.blocks.0.attn.relative_position_bias_table'].shape) == (225, 1)
    assert all(torch.equal(value, expected[name]) for name, value in backbone.model.state_dict().items())


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    path = tmp_path / 'swin.safetensors'
    saved_swin(path, depths=(1, 1, 1, 1))
    init_cfg = dict(type='Pretrained', checkpoint=str(path))
    backbone = TimmBackbone('swin_tiny_patch4_window7_224', model_args=SWIN, init_cfg=init_cfg)
    with pytest.raises(ValueError, match=r'swin.safetensors has no layers_2.blocks.1.*another architecture'):
        backbone.init_weights()


@pytest.mark.parametrize('kind', ['classifier', 'detector'])
@pytest.mark.parametrize(
    ('name', 'settings', 'deeper', 'last', 'deepest'),
    [
        ('swin_tiny_patch4_window7_224', SWIN, dict(depths=(1, 1, 3, 1)), 3, 3),
        ('vit_tiny_patch16_224', VIT, dict(depth=3), 1, 2),
    ],
)
def test_a_deeper_model_is_refused(
    kind: str, name: str, settings: dict[str, Any], deeper: dict[str, Any], last: int, deepest: int, tmp_path: Path
) -> None:
    if kind == 'classifier':
        saved = timm.create_model(name, num_classes=3, **{**settings, **deeper}).state_dict()
    else:
        whole = TimmBackbone(name, out_indices=(deepest,), model_args={**settings, **deeper})
        saved = {f'backbone.{key}': value for key, value in whole.state_dict().items()}
    torch.save(saved, tmp_path / 'deep.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'deep.pth'))
    backbone = TimmBackbone(name, out_indices=(last,), model_args=settings, init_cfg=init_cfg)
    with pytest.raises(ValueError, match='deep.pth is of a deeper model'):
        backbone.init_weights()


def test_the_plain_vit_of_a_detector_is_read(tmp_path: Path) -> None:
    """timm's class around it adds a name of its own to each tensor's."""
    detector = torch.nn.Module()
    detector.backbone = TimmBackbone('vit_tiny_patch16_224', out_indices=(1,), model_args=VIT)
    torch.save({'state_dict': detector.state_dict()}, tmp_path / 'detector.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'detector.pth'))
    backbone = TimmBackbone('vit_tiny_patch16_224', out_indices=(1,), model_args=VIT, init_cfg=init_cfg)
    backbone.init_weights()
    found = backbone.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in detector.backbone.state_dict().items())


def test_a_detector_with_more_stages_is_read(tmp_path: Path) -> None:
    detector = torch.nn.Module()
    detector.backbone = TimmBackbone('swin_tiny_patch4_window7_224', model_args=SWIN)
    detector.head = torch.nn.Linear(2, 2)
    torch.save({'state_dict': detector.state_dict()}, tmp_path / 'detector.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'detector.pth'))
    backbone = TimmBackbone('swin_tiny_patch4_window7_224', out_indices=(0, 1, 2), model_args=SWIN, init_cfg=init_cfg)
    backbone.init_weights()
    x = torch.rand(1, 3, 64, 64)
    expected = detector.backbone.eval()(x)[:3]
    assert all(torch.equal(one, other) for one, other in zip(backbone.eval()(x), expected, strict=True))


def test_positions_of_a_plain_vit_are_resized(tmp_path: Path) -> None:
    settings = dict(depth=1, embed_dim=24, num_heads=3)
    classifier = timm.create_model('vit_tiny_patch16_224', img_size=64, num_classes=3, **settings)
    save_file(classifier.state_dict(), tmp_path / 'vit.safetensors')
    backbone = TimmBackbone(
        'vit_tiny_patch16_224',
        out_indices=(0,),
        model_args=dict(img_size=96, **settings),
        init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'vit.safetensors')),
    )
    backbone.init_weights()
    found = backbone.state_dict()['model.model.pos_embed']
    assert tuple(found.shape) == (1, 1 + 6 * 6, 24)
    assert torch.equal(found[:, 0], classifier.pos_embed[:, 0])
    # Bicubic interpolation keeps the mean of a grid nearly.
    assert torch.allclose(found[:, 1:].mean(1), classifier.pos_embed[:, 1:].mean(1), atol=2e-3)
