from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from gplq.errors import CheckpointError
from gplq.plugins.detection import ViT
from gplq.plugins.pretrained import read_state_dict

SETTINGS = dict(patch_size=4, embed_dim=12, depth=2, num_heads=3, window_size=2, window_block_indexes=(0,))


def classifier(img_size: int = 16) -> timm.models.VisionTransformer:
    torch.manual_seed(0)
    return timm.models.VisionTransformer(
        img_size=img_size, patch_size=4, embed_dim=12, depth=2, num_heads=3, num_classes=5
    ).eval()


def build(path: Path, **kwargs: object) -> ViT:
    settings = dict(img_size=16, pretrain_img_size=16, norm_eps=1e-6, **SETTINGS)
    init_cfg = dict(type='Pretrained', checkpoint=str(path))
    vit = ViT(**{**settings, **kwargs}, init_cfg=init_cfg)
    vit.init_weights()
    return vit.eval()


@pytest.mark.parametrize('kind', ['safetensors', 'pth'])
def test_classifier_weights_give_the_classifiers_features(kind: str, tmp_path: Path) -> None:
    model, path = classifier(), tmp_path / f'model.{kind}'
    if kind == 'pth':
        torch.save({'model': model.state_dict()}, path)
    else:
        save_file(model.state_dict(), path)
    vit = build(path, window_block_indexes=(), use_rel_pos=False)
    x = torch.rand(1, 3, 16, 16)
    # The same sum without the class token, which timm's attention would include.
    tokens = model.patch_embed(x) + model.pos_embed[:, 1:]
    expected = model.blocks(tokens)
    assert torch.allclose(vit(x)[0].flatten(2).transpose(1, 2), expected, atol=1e-5)


def test_fresh_relative_positions_change_nothing(tmp_path: Path) -> None:
    path = tmp_path / 'model.safetensors'
    save_file(classifier().state_dict(), path)
    x = torch.rand(1, 3, 16, 16)
    assert torch.allclose(build(path)(x)[0], build(path, use_rel_pos=False)(x)[0], atol=1e-6)


def test_positions_are_resized_and_the_class_tokens_row_is_kept(tmp_path: Path) -> None:
    model, path = classifier(), tmp_path / 'model.safetensors'
    model.pos_embed.data[:, 1:] = 3.0
    save_file(model.state_dict(), path)
    vit = build(path, pretrain_img_size=32)
    assert vit.pos_embed.shape == (1, 1 + 64, 12)
    assert torch.allclose(vit.pos_embed[:, 1:], torch.tensor(3.0))
    assert torch.equal(vit.pos_embed[:, :1], model.pos_embed[:, :1])


def test_detector_weights_come_without_their_prefix(tmp_path: Path) -> None:
    source = ViT(img_size=16, pretrain_img_size=16, **SETTINGS)
    source.init_weights()
    state = {f'backbone.{name}': value for name, value in source.state_dict().items()}
    torch.save({'state_dict': {**state, 'neck.fpn1.0.weight': torch.zeros(1)}}, tmp_path / 'detector.pth')
    vit = build(tmp_path / 'detector.pth')
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in vit.state_dict().items())


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    path = tmp_path / 'model.safetensors'
    save_file(classifier().state_dict(), path)
    with pytest.raises(ValueError, match=r'pos_embed has shape \(1, 17, 12\) and not \(1, 17, 24\)'):
        build(path, embed_dim=24)
    with pytest.raises(ValueError, match=r'has no blocks\.2\.norm1\.weight; is it'):
        build(path, depth=3)


def test_a_deeper_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / 'model.safetensors'
    save_file(classifier().state_dict(), path)
    with pytest.raises(CheckpointError, match=r'of a deeper model: 12 of its tensors .* such as blocks\.1\.'):
        build(path, depth=1)


def test_weights_of_a_quantized_model_are_no_fp32_weights(tmp_path: Path) -> None:
    path = tmp_path / 'gplq_w4a4.pth'
    torch.save({'meta': {'gplq': {'stage': 'quantized'}}, 'state_dict': classifier().state_dict()}, path)
    with pytest.raises(CheckpointError, match=r'gplq_w4a4.pth holds a quantized model, .* give the FP32 checkpoint'):
        build(path)


@pytest.mark.parametrize(
    ('name', 'value', 'message'),
    [
        (3, torch.zeros(2), 'under 3, which is no weight'),
        ('norm.bias', torch.zeros(12).to_sparse(), "a torch.sparse_coo tensor of torch.float32 under 'norm.bias'"),
        ('norm.bias', torch.zeros(12, dtype=torch.complex64), "of torch.complex64 under 'norm.bias'"),
        (
            'blocks.0.norm1.bias',
            torch.zeros(12, dtype=torch.int8),
            'norm1.bias holds torch.int8, not numbers in floating point',
        ),
    ],
)
def test_tensors_that_are_no_weights(name: object, value: torch.Tensor, message: str, tmp_path: Path) -> None:
    torch.save({'state_dict': {**classifier().state_dict(), name: value}}, tmp_path / 'odd.pth')
    with pytest.raises(CheckpointError, match=message):
        build(tmp_path / 'odd.pth')


class Foreign:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path('executed'),))


def test_nothing_in_a_checkpoint_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({'state_dict': {'x': Foreign()}}, 'foreign.pth')
    with pytest.raises(CheckpointError, match='foreign.pth holds objects that are not data'):
        read_state_dict('foreign.pth')
    assert not Path('executed').exists()


@pytest.mark.parametrize('name', ['model.pth', 'model.safetensors'])
def test_missing_and_truncated_files_are_named(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    with pytest.raises(CheckpointError, match=f'{name} do not exist'):
        read_state_dict(str(path))
    state = {'x': torch.zeros(100)}
    save_file(state, path) if name.endswith('safetensors') else torch.save(state, path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(CheckpointError, match=f'{name} (is no whole safetensors file|is damaged|cannot be read)'):
        read_state_dict(str(path))
