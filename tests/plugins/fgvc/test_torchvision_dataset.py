"""Each data set of torchvision on a miniature of the layout that its publishers give it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
from PIL import Image

from gplq.errors import DataError, RecipeError
from gplq.plugins.fgvc import LoadImage, TorchvisionDataset
from gplq.plugins.fgvc.torchvision_dataset import FOLDERS, SOURCES


def draw(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 6, 3), 90, np.uint8)).save(path)


def aircraft(root: Path) -> None:
    data = root / 'fgvc-aircraft-2013b' / 'data'
    for name in ('0001', '0002'):
        draw(data / 'images' / f'{name}.jpg')
    (data / 'variants.txt').write_text('707-320\n727-200\n')
    (data / 'images_variant_test.txt').write_text('0001 727-200\n0002 707-320\n')


def food(root: Path) -> None:
    for name in ('waffles/1', 'apple_pie/2'):
        draw(root / 'food-101' / 'images' / f'{name}.jpg')
    meta = root / 'food-101' / 'meta'
    meta.mkdir()
    (meta / 'test.json').write_text('{"waffles": ["waffles/1"], "apple_pie": ["apple_pie/2"]}')


def flowers(root: Path) -> None:
    data = root / 'flowers-102'
    for number in (1, 2):
        draw(data / 'jpg' / f'image_{number:05d}.jpg')
    scipy.io.savemat(data / 'imagelabels.mat', {'labels': np.array([[2, 1]])})
    scipy.io.savemat(
        data / 'setid.mat', {'trnid': np.array([[1]]), 'valid': np.array([[1]]), 'tstid': np.array([[1, 2]])}
    )


def pets(root: Path) -> None:
    data = root / 'oxford-iiit-pet'
    for name in ('Bengal_1', 'Abyssinian_2'):
        draw(data / 'images' / f'{name}.jpg')
    (data / 'annotations').mkdir()
    (data / 'annotations' / 'test.txt').write_text('Bengal_1 2 1 2\nAbyssinian_2 1 1 1\n')


def cars(root: Path) -> None:
    data = root / 'stanford_cars'
    for name in ('00001', '00002'):
        draw(data / 'cars_test' / f'{name}.jpg')
    (data / 'devkit').mkdir()
    scipy.io.savemat(
        data / 'devkit' / 'cars_meta.mat', {'class_names': np.array(['AM General Hummer', 'Acura RL'], dtype=object)}
    )
    kind = np.dtype([('fname', object), ('class', object)])
    annotations = np.array([('00001.jpg', 2), ('00002.jpg', 1)], dtype=kind)
    scipy.io.savemat(data / 'cars_test_annos_withlabels.mat', {'annotations': annotations})


def folder(root: Path) -> None:
    draw(root / 'test' / 'b' / '1.png')
    draw(root / 'test' / 'a' / '2.png')


def imagenet(root: Path) -> None:
    import torch

    draw(root / 'val' / 'n02' / '1.JPEG')
    draw(root / 'val' / 'n01' / '2.JPEG')
    torch.save(({'n01': ('tench', 'Tinca tinca'), 'n02': ('goldfish',)}, []), root / 'meta.bin')


MINIATURES: dict[str, tuple[Callable[[Path], None], str]] = {
    'FGVCAircraft': (aircraft, 'test'),
    'Food101': (food, 'test'),
    'Flowers102': (flowers, 'test'),
    'OxfordIIITPet': (pets, 'test'),
    'StanfordCars': (cars, 'test'),
    'ImageFolder': (folder, 'test'),
    'ImageNet': (imagenet, 'val'),
}


def test_every_data_set_has_a_miniature() -> None:
    assert set(MINIATURES) == set(SOURCES)


@pytest.mark.parametrize('name', list(MINIATURES))
def test_published_layout(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The one class that compares the files' published checksums.
    monkeypatch.setattr('torchvision.datasets.flowers102.check_integrity', lambda path, md5: Path(path).is_file())
    make, split = MINIATURES[name]
    make(tmp_path)
    dataset = TorchvisionDataset(name, str(tmp_path), split=split, pipeline=[LoadImage()])
    found: dict[str, Any] = {}
    for index in range(len(dataset)):
        sample = dataset[index]
        assert sample['img'].size == (6, 4)
        found[Path(sample['img_path']).stem.rpartition('_')[2].lstrip('0')] = sample['gt_label']
    # In each miniature the first image is of the second class.
    assert found == {'1': 1, '2': 0}


@pytest.mark.parametrize('name', list(MINIATURES))
def test_a_missing_download_says_where_it_comes_from_and_how_it_must_lie(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        TorchvisionDataset(name, str(tmp_path / 'nothing'), split=MINIATURES[name][1])
    where, how = SOURCES[name]
    assert where in str(error.value) and how in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.parametrize('name', [name for name in MINIATURES if name not in FOLDERS])
def test_half_a_download_says_the_same(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('torchvision.datasets.flowers102.check_integrity', lambda path, md5: Path(path).is_file())
    make, split = MINIATURES[name]
    make(tmp_path)
    image = next(path for path in sorted(tmp_path.rglob('*')) if path.suffix in ('.jpg', '.png') and '2' in path.stem)
    image.unlink()
    with pytest.raises(DataError, match=f'{image.name} is missing; get it from '):
        TorchvisionDataset(name, str(tmp_path), split=split)


def test_damaged_lists_splits_and_options_get_an_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('torchvision.datasets.flowers102.check_integrity', lambda path, md5: Path(path).is_file())
    for name, damaged in (('FGVCAircraft', 'variants.txt'), ('Flowers102', 'setid.mat'), ('ImageNet', 'meta.bin')):
        make, split = MINIATURES[name]
        make(tmp_path / name)
        next((tmp_path / name).rglob(damaged)).write_bytes(b'')
        with pytest.raises(DataError, match=f'{name} cannot be read from .*a list in it is damaged.*get it from'):
            TorchvisionDataset(name, str(tmp_path / name), split=split)
    with pytest.raises(DataError, match="FGVCAircraft has no split 'dev': .*trainval"):
        TorchvisionDataset('FGVCAircraft', str(tmp_path / 'FGVCAircraft'), split='dev')
    with pytest.raises(RecipeError, match=r"FGVCAircraft has no option \['level'\]; known are .*annotation_level"):
        TorchvisionDataset('FGVCAircraft', str(tmp_path / 'FGVCAircraft'), options={'level': 'family'})


def test_unknown_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'CIFAR10' is none of .*Food101"):
        TorchvisionDataset('CIFAR10', str(tmp_path))


def test_splits_of_other_classes_are_refused(tmp_path: Path) -> None:
    for place in ('train/ant/1.png', 'train/bee/2.png', 'val/ant/3.png'):
        draw(tmp_path / place)
    with pytest.raises(DataError, match=r"do not have the same classes, such as \['bee'\]"):
        TorchvisionDataset('ImageFolder', str(tmp_path), split='val')
    (tmp_path / 'val' / 'bee').mkdir()
    assert TorchvisionDataset('ImageFolder', str(tmp_path), split='val').metainfo['classes'] == ('ant', 'bee')
    (tmp_path / 'val' / '.ipynb_checkpoints').mkdir()
    (tmp_path / 'train' / '.ipynb_checkpoints').mkdir()
    with pytest.raises(DataError, match='val holds the hidden folder .ipynb_checkpoints, which .* remove it'):
        TorchvisionDataset('ImageFolder', str(tmp_path), split='val')


@pytest.mark.parametrize(
    ('change', 'differing'), [('n02', r"1 folders .* 2 classes; they differ in \['n02'\]"), ('+n03', r"\['n03'\]")]
)
def test_a_part_of_imagenets_folders_is_refused(change: str, differing: str, tmp_path: Path) -> None:
    imagenet(tmp_path)
    assert TorchvisionDataset('ImageNet', str(tmp_path), split='val').metainfo['classes'] == ('tench', 'goldfish')
    if change == 'n02':
        shutil.rmtree(tmp_path / 'val' / 'n02')
    else:
        draw(tmp_path / 'val' / 'n03' / '3.JPEG')
    with pytest.raises(DataError, match=f"{differing}.*name='ImageFolder'"):
        TorchvisionDataset('ImageNet', str(tmp_path), split='val')


@pytest.mark.parametrize('kinds', ['binary-category', 'segmentation', ['category', 'segmentation']])
def test_targets_other_than_breeds_are_refused(kinds: Any, tmp_path: Path) -> None:
    pets(tmp_path)
    TorchvisionDataset('OxfordIIITPet', str(tmp_path), split='test', options=dict(target_types='category'))
    with pytest.raises(RecipeError, match="OxfordIIITPet is read with target_types='category'.* not with .*leave"):
        TorchvisionDataset('OxfordIIITPet', str(tmp_path), split='test', options=dict(target_types=kinds))


@pytest.mark.parametrize(
    ('settings', 'told'),
    [
        (dict(data_root=None), 'data_root must be a string or a Path, got None'),
        (dict(options='family'), "options must be a dict or None, got 'family'"),
        (dict(split=1), 'split must be a string or None, got 1'),
    ],
)
def test_settings_of_other_types(settings: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=f'TorchvisionDataset: {told}'):
        TorchvisionDataset(**{'name': 'Food101', 'data_root': str(tmp_path), **settings})
