"""A timm model in two parts computes what timm's own does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from gplq.errors import CheckpointError, DataError, RecipeError
from gplq.plugins.fgvc import TimmClassifier

VIT = dict(img_size=32, patch_size=8, depth=2, embed_dim=24, num_heads=3)
SWIN = dict(img_size=32, window_size=4, embed_dim=12, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2))
MODELS = [('vit_tiny_patch16_224', VIT), ('swin_tiny_patch4_window7_224', SWIN), ('deit_tiny_patch16_224', VIT)]


@pytest.mark.parametrize(('name', 'settings'), MODELS)
def test_logits_are_those_of_the_classifier_in_the_file(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    classifier = timm.create_model(name, num_classes=5, **settings).eval()
    save_file(classifier.state_dict(), tmp_path / 'model.safetensors')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'model.safetensors'))
    model = TimmClassifier(name, num_classes=5, model_args=settings, init_cfg=init_cfg)
    model.init_weights()
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(model.eval()(x), classifier(x), atol=1e-6)
    # And those of our own checkpoint, whose head has another place.
    torch.save({'state_dict': model.state_dict()}, tmp_path / 'ours.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'ours.pth'))
    again = TimmClassifier(name, num_classes=5, model_args=settings, init_cfg=init_cfg)
    again.init_weights()
    with torch.no_grad():
        assert torch.equal(again.eval()(x), model(x))


def test_a_head_of_other_classes_is_fresh_and_positions_are_resized(tmp_path: Path) -> None:
    classifier = timm.create_model('vit_tiny_patch16_224', num_classes=5, **VIT)
    save_file(classifier.state_dict(), tmp_path / 'model.safetensors')
    model = TimmClassifier(
        'vit_tiny_patch16_224',
        num_classes=7,
        model_args={**VIT, 'img_size': 64},
        init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'model.safetensors')),
    )
    model.init_weights()
    assert tuple(model(torch.rand(1, 3, 64, 64)).shape) == (1, 7)
    assert torch.equal(model.backbone.blocks[1].mlp.fc1.weight, classifier.blocks[1].mlp.fc1.weight)


@pytest.mark.parametrize(
    ('name', 'settings', 'deeper'),
    [
        ('vit_tiny_patch16_224', VIT, dict(depth=3)),
        ('swin_tiny_patch4_window7_224', SWIN, dict(depths=(1, 1, 2, 1))),
    ],
)
def test_the_first_blocks_of_a_deeper_model_are_refused(
    name: str, settings: dict[str, Any], deeper: dict[str, Any], tmp_path: Path
) -> None:
    """A Swin-S is not a Swin-T with tensors to spare."""
    file = tmp_path / 'deep.safetensors'
    save_file(timm.create_model(name, num_classes=5, **{**settings, **deeper}).state_dict(), file)
    init_cfg = dict(type='Pretrained', checkpoint=str(file))
    model = TimmClassifier(name, num_classes=5, model_args=settings, init_cfg=init_cfg)
    with pytest.raises(CheckpointError, match='deep.safetensors is of a deeper model'):
        model.init_weights()


def test_a_layer_before_the_classifier_is_not_another_block(tmp_path: Path) -> None:
    """Without its classifier this model's head is shorter."""
    file = tmp_path / 'whole.safetensors'
    state = timm.create_model('efficientvit_b0').state_dict()
    save_file(state, file)
    init_cfg = dict(type='Pretrained', checkpoint=str(file))
    model = TimmClassifier('efficientvit_b0', num_classes=5, init_cfg=init_cfg)
    model.init_weights()
    loaded = model.backbone.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in loaded.items())


@pytest.mark.parametrize(
    ('settings', 'message'),
    [(dict(in_chans=1), 'images have 3 channels .* made for 1'), (dict(global_pool=''), 'not pooled to one vector')],
)
def test_models_that_do_not_take_or_give_what_they_should(settings: dict[str, Any], message: str) -> None:
    model = TimmClassifier('vit_tiny_patch16_224', num_classes=5, model_args={**VIT, **settings})
    with pytest.raises((DataError, RecipeError), match=message):
        model(torch.rand(2, 3, 32, 32))


@pytest.mark.parametrize('init_cfg', [dict(type='Pretraind'), [dict(type='Pretrained', checkpoint='none.pth')]])
def test_an_init_cfg_that_mmengine_cannot_use(init_cfg: Any) -> None:
    model = TimmClassifier('vit_tiny_patch16_224', num_classes=5, model_args=VIT, init_cfg=init_cfg)
    with pytest.raises(RecipeError, match='mmengine cannot use init_cfg'):
        model.init_weights()


def test_loss_and_predictions() -> None:
    model = TimmClassifier('vit_tiny_patch16_224', num_classes=5, model_args=VIT, label_smoothing=0.1).eval()
    x, labels = torch.rand(3, 3, 32, 32), [4, 0, 2]
    with torch.no_grad():
        logits = model(x)
        loss = model(x, labels, mode='loss')['loss_cls']
        found = model(x, labels, mode='predict', img_path=['a', 'b', 'c'])
    smooth = 0.9 * F.one_hot(torch.tensor(labels), 5) + 0.1 / 5
    assert float(loss) == pytest.approx(float(-(smooth * logits.log_softmax(-1)).sum(-1).mean()), rel=1e-5)
    assert [(sample['label'], sample['img_path']) for sample in found] == [(4, 'a'), (0, 'b'), (2, 'c')]
    assert torch.allclose(torch.stack([sample['scores'] for sample in found]).sum(-1), torch.ones(3))


def test_a_frozen_backbone_is_run_as_in_evaluation_and_takes_no_gradient() -> None:
    settings = {**VIT, 'drop_path_rate': 0.5}
    model = TimmClassifier('vit_tiny_patch16_224', num_classes=5, model_args=settings, frozen=True).train()
    x = torch.rand(2, 3, 32, 32)
    assert not model.backbone.training and model.head.training
    model(x, [0, 1], mode='loss')['loss_cls'].backward()
    assert model.head.weight.grad is not None
    assert all(parameter.grad is None for parameter in model.backbone.parameters())
    # Features from a cache give the same.
    with torch.no_grad():
        assert torch.equal(model.backbone(x), model.features(x))
        assert torch.equal(model(model.features(x)), model(x))


def test_mixed_images_have_mixed_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    settings = dict(mixup_alpha=1.0, label_smoothing=0.0)
    model = TimmClassifier('vit_tiny_patch16_224', num_classes=5, model_args=VIT, mixup=settings).train()
    monkeypatch.setattr(model.mixup, '_params_per_batch', lambda: (0.7, False))
    x, labels = torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    with torch.no_grad():
        loss = model(x.clone(), labels, mode='loss')['loss_cls']
        # timm mixes the batch with itself turned around.
        soft = 0.7 * F.one_hot(labels, 5) + 0.3 * F.one_hot(labels.flip(0), 5)
        expected = -(soft * model.logits(0.7 * x + 0.3 * x.flip(0)).log_softmax(-1)).sum(-1).mean()
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize('name', ['deit_tiny_distilled_patch16_224', 'pit_ti_distilled_224'])
def test_a_head_of_several_parts_is_refused_and_a_fresh_one_taken(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_file(timm.create_model(name, num_classes=5).state_dict(), tmp_path / 'model.safetensors')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'model.safetensors'))
    with pytest.raises(ValueError, match=f'head of {name} is more than one Linear'):
        TimmClassifier(name, num_classes=5, init_cfg=init_cfg).init_weights()
    TimmClassifier(name, num_classes=7, init_cfg=init_cfg).init_weights()


def test_a_head_on_two_vectors_of_features_is_refused(tmp_path: Path) -> None:
    save_file(timm.create_model('crossvit_tiny_240', num_classes=5).state_dict(), tmp_path / 'model.safetensors')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'model.safetensors'))
    with pytest.raises(CheckpointError, match='head of crossvit_tiny_240 is more than one Linear'):
        TimmClassifier('crossvit_tiny_240', num_classes=5, init_cfg=init_cfg).init_weights()


@pytest.mark.parametrize(
    ('name', 'settings', 'size'),
    [
        ('vit_tiny_patch16_224', VIT, (32, 32)),
        ('vit_tiny_patch16_224', {**VIT, 'img_size': (32, 64)}, (32, 64)),
        # No patch embedding that knows it.
        ('maxvit_rmlp_pico_rw_256', dict(img_size=64), (64, 64)),
        ('mobilenetv3_small_050', {}, (224, 224)),
    ],
)
def test_the_size_that_a_model_is_made_for(name: str, settings: dict[str, Any], size: tuple[int, int]) -> None:
    assert TimmClassifier(name, num_classes=2, model_args=settings).backbone.img_size == size


def test_weights_for_other_channels_and_other_shapes_of_images(tmp_path: Path) -> None:
    torch.manual_seed(0)
    grey = {**VIT, 'in_chans': 1}
    classifier = timm.create_model('vit_tiny_patch16_224', num_classes=5, **grey)
    save_file(classifier.state_dict(), tmp_path / 'model.safetensors')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'model.safetensors'))
    model = TimmClassifier('vit_tiny_patch16_224', 5, model_args={**grey, 'img_size': (32, 64)}, init_cfg=init_cfg)
    model.init_weights()
    assert tuple(model(torch.rand(1, 1, 32, 64)).shape) == (1, 5)
    # The class token's stays; a row of positions is stretched as it is by itself.
    ours, own = model.backbone.pos_embed, classifier.pos_embed
    assert torch.equal(ours[:, 0], own[:, 0])
    grid = own[:, 1:].reshape(1, 4, 4, 24).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, size=(4, 8), mode='bicubic', antialias=True).permute(0, 2, 3, 1).reshape(1, 32, 24)
    assert torch.allclose(ours[:, 1:], expected, atol=1e-6)


def test_images_of_another_size_are_told_with_what_to_set() -> None:
    model = TimmClassifier('vit_tiny_patch16_224', num_classes=5, model_args=VIT)
    with pytest.raises(DataError, match=r'images are \(32, 48\).*made for \(32, 32\): set model_args=dict\(img_size='):
        model(torch.rand(1, 3, 32, 48))
    free = TimmClassifier('vit_tiny_patch16_224', num_classes=5, model_args={**VIT, 'dynamic_img_size': True})
    assert tuple(free(torch.rand(1, 3, 32, 48)).shape) == (1, 5)


def test_features_that_pass_a_hidden_layer() -> None:
    model = TimmClassifier('mobilenetv3_small_050', num_classes=5)
    assert tuple(model(torch.rand(2, 3, 32, 32)).shape) == (2, 5)


def test_unknown_model_is_named() -> None:
    with pytest.raises(ValueError, match="no model 'vit_huge'"):
        TimmClassifier('vit_huge', num_classes=2)


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        (dict(num_classes=0), 'num_classes=0 must be at least 1'),
        (dict(num_classes=2, model_args=dict(num_classes=2)), 'num_classes is an argument of its own'),
        (dict(num_classes='two'), "TimmClassifier: num_classes must be an integer, got 'two'"),
        (dict(num_classes=2.5), 'num_classes must be an integer, got 2.5'),
        (dict(num_classes=2, model_args=[1]), r'model_args must be a dict or None, got \[1\]'),
        (dict(num_classes=2, drop_rate=2.0), r'drop_rate=2.0 must be in \[0, 1\)'),
        (dict(num_classes=2, label_smoothing=1.0), r'label_smoothing=1.0 must be in \[0, 1\)'),
        (dict(num_classes=2, mixup=dict(mixup_alpa=1.0)), "timm does not take mixup={'mixup_alpa': 1.0}: .*mixup_alpa"),
        (dict(num_classes=2, mixup=dict(mixup_alpha=0.0)), 'timm does not take mixup={.*}: AssertionError'),
        (dict(num_classes=2, mixup=dict(mixup_alpha='a')), 'timm does not take mixup={.*}: TypeError'),
        (dict(num_classes=2, mixup=dict(num_classes=7)), 'leave it out of mixup'),
        (dict(num_classes=2, model_args=dict(imgsize=32)), 'timm cannot make mobilenetv3_small_050 with .*imgsize'),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        TimmClassifier('mobilenetv3_small_050', **settings)


def test_what_a_forward_pass_cannot_do() -> None:
    model, x = TimmClassifier('mobilenetv3_small_050', num_classes=5).eval(), torch.rand(2, 3, 32, 32)
    with pytest.raises(RecipeError, match="mode='pred' is none of 'tensor', 'loss' and 'predict'"):
        model(x, [0, 1], mode='pred')
    with pytest.raises(DataError, match="mode='predict' needs labels in the batch"):
        model(x, mode='predict')
    with pytest.raises(DataError, match=r'soft labels are \(2, 4\), not \(2, 5\)'):
        model(x, [0, 1], mode='loss', soft_labels=torch.ones(2, 4) / 4)


def test_weights_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = TimmClassifier('mobilenetv3_small_050', num_classes=5)
    state = {f'backbone.{name}': value for name, value in model.backbone.state_dict().items()}
    state['backbone.conv_stem.weight'][0, 0, 0, 0] = torch.nan
    torch.save({'state_dict': state}, tmp_path / 'nan.pth')
    broken = dict(type='Pretrained', checkpoint=str(tmp_path / 'nan.pth'))
    with pytest.raises(CheckpointError, match=r'nan.pth: backbone.conv_stem.weight holds NaN or infinite values'):
        TimmClassifier('mobilenetv3_small_050', num_classes=5, init_cfg=broken).init_weights()
    for kind in ('Quantized', 'Pretrained'):
        with pytest.raises(RecipeError, match=rf"init_cfg=dict\(type='{kind}'\) names no file"):
            TimmClassifier('mobilenetv3_small_050', 5, frozen=True, init_cfg=dict(type=kind)).init_weights()

    def offline(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError('no route\nto host')

    fetched = TimmClassifier('mobilenetv3_small_050', num_classes=5, pretrained=True)
    monkeypatch.setattr('timm.create_model', offline)
    with pytest.raises(
        CheckpointError, match=r'weights of mobilenetv3_small_050 \(ConnectionError: no route\); .*give a'
    ):
        fetched.init_weights()


def test_nothing_of_detection_is_imported() -> None:
    import subprocess
    import sys

    code = "import sys, gplq.plugins.fgvc; sys.exit(any(n.split('.')[0] in ('mmcv', 'mmdet') for n in sys.modules))"
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0
