"""Soft labels of crops: what is stored comes back, damage is found, and a resumed run draws the same crops."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, MODELS
from PIL import Image
from torch.nn import functional as F

from gplq.errors import DataError
from gplq.plugins.fgvc import CUBDataset, LoadImage, MultiCropDataset, TimmClassifier, collate_crops
from gplq.plugins.fgvc.multi_crop import cut, paths_of
from gplq.plugins.fgvc.soft_labels import Crops, Seen, SoftLabels, soft_targets, top_chances, write_soft_labels
from gplq.plugins.hooks.replay_data import Draw, ReplayDataset

TOOL = Path(__file__).parents[3] / 'tools' / 'store_soft_labels.py'


def made(images: int = 6, crops: int = 5, k: int = 2, classes: int = 3) -> Crops:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(images, crops, classes, generator=generator)
    boxes = torch.stack([torch.arange(images * crops).reshape(images, crops) % n for n in (3, 2, 4, 5)], -1)
    boxes[..., 2:] += 4
    flips = torch.rand(images, crops, generator=generator) < 0.5
    return Crops(boxes.to(torch.int16), flips, *top_chances(logits, k))


@pytest.fixture
def dataset(cub_root: Path) -> CUBDataset:
    return CUBDataset(str(cub_root), pipeline=[dict(type='gplq.plugins.fgvc.LoadImage')])


@pytest.fixture
def stored(dataset: CUBDataset, tmp_path: Path) -> Path:
    path = tmp_path / 'soft.safetensors'
    write_soft_labels(path, made(), paths_of(dataset), 3, 'teacher', Seen(8, (0.0,) * 3, (1.0,) * 3))
    return path


def test_what_is_written_is_read(stored: Path, dataset: CUBDataset) -> None:
    labels, expected = SoftLabels(str(stored)), made()
    assert (labels.shape, labels.num_classes, labels.teacher) == ((6, 5), 3, 'teacher')
    assert labels.seen == Seen(8, (0.0,) * 3, (1.0,) * 3)
    labels.check(paths_of(dataset), 3)
    # As a worker gets it.
    labels = pickle.loads(pickle.dumps(labels))
    for image in (0, 5):
        found = labels.crops(image, [3, 0])
        for name in ('boxes', 'flips', 'classes', 'chances'):
            assert torch.equal(getattr(found, name), getattr(expected, name)[image][[3, 0]])


def test_what_the_likeliest_leave_is_spread_over_the_others() -> None:
    logits = torch.tensor([[2.0, 0.0, 1.0, -1.0]])
    chances = logits.softmax(-1)[0]
    classes, kept = top_chances(logits, 2)
    assert classes.tolist() == [[0, 2]]
    (found,) = soft_targets(Crops(torch.zeros(1, 4), torch.zeros(1), classes, kept), 4)
    rest = float(chances[1] + chances[3]) / 2
    assert found.tolist() == pytest.approx([float(chances[0]), rest, float(chances[2]), rest], abs=1e-3)
    assert float(found.sum()) == pytest.approx(1)
    classes, kept = top_chances(logits, 4)
    (whole,) = soft_targets(Crops(torch.zeros(1, 4), torch.zeros(1), classes, kept), 4)
    assert whole.tolist() == pytest.approx(chances.tolist(), abs=1e-3)


def test_crops_are_those_that_were_stored(stored: Path, cub_root: Path) -> None:
    inner = dict(type=CUBDataset, data_root=str(cub_root), pipeline=[dict(type=LoadImage)])
    data = MultiCropDataset(inner, str(stored), crops=5)
    sample, expected = data[2], made()
    picture = Image.open(sample['img_path']).convert('RGB')
    wanted = [
        cut(picture, box, bool(flip), 8)
        for box, flip in zip(expected.boxes[2].tolist(), expected.flips[2], strict=True)
    ]
    assert sample['inputs'].shape == (5, 3, 8, 8)
    for crop, soft in zip(sample['inputs'], sample['soft_labels'], strict=True):
        (number,) = [n for n, other in enumerate(wanted) if torch.equal(crop, other)][:1]
        one = Crops(*(getattr(expected, name)[2, number] for name in ('boxes', 'flips', 'classes', 'chances')))
        torch.testing.assert_close(soft, soft_targets(one, 3))
    mirrored = cut(picture, (1, 1, 6, 6), True, 8)
    torch.testing.assert_close(mirrored.flip(-1), cut(picture, (1, 1, 6, 6), False, 8), atol=0.02, rtol=0)


def test_a_batch_of_crops_trains_a_classifier(stored: Path, cub_root: Path) -> None:
    inner = dict(type=CUBDataset, data_root=str(cub_root), pipeline=[dict(type=LoadImage)])
    data = MultiCropDataset(inner, str(stored), crops=2)
    batch = collate_crops([data[0], data[3]])
    assert [len(values) for values in batch.values()] == [4] * 4
    args = dict(img_size=8, patch_size=4, embed_dim=12, depth=1, num_heads=2)
    model = TimmClassifier('vit_tiny_patch16_224', 3, model_args=args, label_smoothing=0.1)
    inputs = torch.stack(batch['inputs'])
    losses = model(inputs, batch['labels'], mode='loss', soft_labels=batch['soft_labels'], img_path=batch['img_path'])
    expected = -(torch.stack(batch['soft_labels']) * F.log_softmax(model(inputs), -1)).sum(-1).mean()
    torch.testing.assert_close(losses['loss_cls'], expected)
    # Calibration reads the inner data set, whose samples have no crops.
    plain = collate_crops([dict(inputs=torch.zeros(3, 8, 8), labels=1)])
    assert plain['labels'] == [1]


def test_a_resumed_run_draws_the_crops_of_the_undisturbed_one(stored: Path, cub_root: Path) -> None:
    """In the middle of an image's crops: they are drawn by seed, pass and image alone."""
    inner = dict(type=CUBDataset, data_root=str(cub_root), pipeline=[dict(type=LoadImage)])
    passes = []
    for order in ([0, 1, 2, 3, 4, 5], [3, 4, 5]):
        data = ReplayDataset(MultiCropDataset(inner, str(stored), crops=2))
        data.seed(4)
        torch.manual_seed(len(order))
        passes.append({number: data[Draw(1, number)]['inputs'] for number in order})
    assert all(torch.equal(passes[0][number], passes[1][number]) for number in (3, 4, 5))
    data = ReplayDataset(MultiCropDataset(inner, str(stored), crops=2))
    assert any(not torch.equal(data[Draw(0, n)]['inputs'], data[Draw(1, n)]['inputs']) for n in range(6))


def test_what_cannot_be_used_is_named(stored: Path, dataset: CUBDataset, tmp_path: Path, cub_root: Path) -> None:
    labels = SoftLabels(str(stored))
    with pytest.raises(DataError, match='do not exist: write them with tools/store_soft_labels.py'):
        SoftLabels(str(tmp_path / 'none.safetensors'))
    with pytest.raises(DataError, match='of 6 images, the data set has 6 or others'):
        labels.check(list(reversed(paths_of(dataset))), 3)
    with pytest.raises(DataError, match='have 3 classes, the model 4'):
        labels.check(paths_of(dataset), 4)
    inner = dict(type=CUBDataset, data_root=str(cub_root), pipeline=[dict(type=LoadImage)])
    with pytest.raises(DataError, match=r'crops=6: .* has 5 of each image'):
        MultiCropDataset(inner, str(stored), crops=6)
    content = stored.read_bytes()
    damaged = tmp_path / 'damaged.safetensors'
    damaged.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(DataError, match='damaged, their checksum differs'):
        SoftLabels(str(damaged))
    damaged.write_bytes(content[:-40])
    with pytest.raises(DataError, match='cannot be read'):
        SoftLabels(str(damaged))
    damaged.write_bytes(content.replace(b'\\"version\\": 2', b'\\"version\\": 7'))
    with pytest.raises(DataError, match=r'no soft labels of version 2 \(version 7\)'):
        SoftLabels(str(damaged))


def test_the_tool_stores_what_the_teacher_says(cub_root: Path, tmp_path: Path) -> None:
    config, checkpoint, out = tmp_path / 'teacher.py', tmp_path / 'fp32.pth', tmp_path / 'soft.safetensors'
    config.write_text(f"""
custom_imports = dict(imports=['gplq.plugins.fgvc'])
default_scope = 'mmengine'
model = dict(
    type='gplq.plugins.fgvc.TimmClassifier', model_name='vit_tiny_patch16_224', num_classes=3,
    model_args=dict(img_size=8, patch_size=4, embed_dim=12, depth=1, num_heads=2))
train_dataloader = dict(batch_size=2, dataset=dict(
    type='gplq.plugins.fgvc.CUBDataset', data_root={str(cub_root)!r}, pipeline=[dict(type='ToNothing')]))
val_dataloader = dict(dataset=dict(pipeline=[
    dict(type='gplq.plugins.fgvc.LoadImage'),
    dict(type='gplq.plugins.fgvc.TimmTransform', mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2))]))
""")
    torch.manual_seed(0)
    teacher = MODELS.build(Config.fromfile(config).model).eval()
    torch.save({'state_dict': teacher.state_dict()}, checkpoint)
    command = [sys.executable, str(TOOL), str(config), str(checkpoint), str(out), '--crops', '3', '--top', '3']
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    labels = SoftLabels(str(out))
    # As evaluation normalizes; its own step in training says otherwise.
    assert (labels.shape, labels.seen) == ((6, 3), Seen(8, (0.5, 0.4, 0.3), (0.2, 0.2, 0.2)))
    inner = dict(type=CUBDataset, data_root=str(cub_root), pipeline=[dict(type=LoadImage)])
    data = DATASETS.build(dict(type='MultiCropDataset', dataset=inner, soft_labels=str(out), crops=3))
    sample = data[1]
    with torch.no_grad():
        torch.testing.assert_close(sample['soft_labels'], teacher(sample['inputs']).softmax(-1), atol=2e-3, rtol=0)
    again = subprocess.run([*command[:-1], '9'], capture_output=True, text=True, timeout=300)
    assert again.returncode == 2
    assert '--top 9 between 1 and 3' in again.stderr.replace('must be at least 1, ', '')
