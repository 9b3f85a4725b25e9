"""CUB's files, read as they are published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gplq.errors import DataError, RecipeError
from gplq.plugins.fgvc import CUBDataset, LoadImage


def numbers(dataset: CUBDataset) -> list[int]:
    paths = [dataset.get_data_info(index)['img_path'] for index in range(len(dataset))]
    return [int(Path(path).stem.rpartition('_')[2]) for path in paths]


def test_published_splits_classes_and_order(cub_root: Path) -> None:
    train, test = (CUBDataset(str(cub_root), split=split) for split in ('train', 'test'))
    assert numbers(train) == [1, 2, 3, 4, 5, 6] and numbers(test) == [7, 8, 9, 10, 11, 12]
    assert train.metainfo['classes'] == ('Black_footed_Albatross', 'Laysan_Albatross', 'Sooty_Albatross')
    assert [train.get_data_info(index)['gt_label'] for index in range(6)] == [0, 1, 2, 0, 1, 2]
    assert 'box' not in train.get_data_info(0)


def test_held_out_images_can_be_split_further(cub_root: Path) -> None:
    splits = {s: CUBDataset(str(cub_root), split=s, split_file='dev_test_split.txt') for s in ('train', 'dev', 'test')}
    assert {split: numbers(dataset) for split, dataset in splits.items()} == {
        'train': [1, 2, 3, 4, 5, 6],
        'dev': [7, 8, 9],
        'test': [10, 11, 12],
    }


def test_boxes_are_cut_out(cub_root: Path) -> None:
    dataset = CUBDataset(str(cub_root), crop=True, pipeline=[LoadImage()])
    assert dataset.get_data_info(0)['box'] == [2.0, 3.0, 2.0, 5.0]
    assert dataset[0]['img'].size == (2, 5)
    # Half a width and height more on each side, as far as the image of 12 x 10 reaches.
    assert CUBDataset(str(cub_root), crop=True, pipeline=[LoadImage(margin=0.5)])[0]['img'].size == (4, 10)


@pytest.mark.parametrize(
    ('broken', 'message'),
    [
        ('images.txt', 'images.txt is missing; CUB-200-2011 comes from https.*images/'),
        ('classes.txt', 'classes.txt is missing; CUB-200-2011 comes from'),
        ('images/001.Black_footed_Albatross/bird_1.jpg', 'bird_1.jpg is missing; CUB-200-2011'),
    ],
)
def test_what_is_missing_is_named(broken: str, message: str, cub_root: Path) -> None:
    (cub_root / broken).unlink()
    with pytest.raises(DataError, match=message):
        CUBDataset(str(cub_root))


def test_damaged_lists_and_unknown_splits(cub_root: Path) -> None:
    with pytest.raises(DataError, match=r"no split 'dev', it has \['test', 'train'\]"):
        CUBDataset(str(cub_root), split='dev')
    (cub_root / 'train_test_split.txt').write_text('1 1\nnonsense\n')
    with pytest.raises(DataError, match=r"train_test_split.txt holds 'nonsense' where NUMBER REST is due"):
        CUBDataset(str(cub_root))


def test_lists_are_text(cub_root: Path) -> None:
    (cub_root / 'images.txt').write_bytes(b'1 \xff\xfe.jpg\n')
    with pytest.raises(DataError, match=r'images.txt is no text in UTF-8 .*CUB-200-2011 comes from'):
        CUBDataset(str(cub_root))


def test_corrupt_images_are_named_or_left_out_and_counted(cub_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (cub_root / 'images/002.Laysan_Albatross/bird_5.jpg').write_bytes(b'no image')
    pipeline = [LoadImage()]
    whole = CUBDataset(str(cub_root), pipeline=pipeline)
    assert len(whole) == 6
    with pytest.raises(DataError, match='bird_5.jpg cannot be read as an image'):
        whole[4]
    assert numbers(CUBDataset(str(cub_root), pipeline=pipeline, corrupt='skip')) == [1, 2, 3, 4, 6]
    with pytest.raises(DataError, match="corrupt='ignore' must be"):
        CUBDataset(str(cub_root), corrupt='ignore')


def test_a_list_of_splits_that_was_cut_off(cub_root: Path) -> None:
    path = cub_root / 'train_test_split.txt'
    path.write_text('\n'.join(path.read_text().splitlines()[:5]))
    with pytest.raises(DataError, match='says nothing of 7 of 12 images, such as number 6; CUB-200-2011 comes from'):
        CUBDataset(str(cub_root))


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda lines: lines[:2], 'dev_test_split.txt says nothing of 4 images, such as number 9; .* each of the 6 '),
        (lambda lines: ['1 test', *lines], 'dev_test_split.txt has also 1 images, such as number 1; .* no other'),
        (lambda lines: [lines[0].replace('dev', 'train'), *lines[1:]], 'dev_test_split.txt has train, .* held out'),
        (
            lambda lines: [line.replace('test', 'dev') for line in lines],
            r"split.txt names no test image, only \['dev'\]",
        ),
        (lambda lines: [*lines, '99 test'], 'dev_test_split.txt has also 1 images, such as number 99'),
    ],
)
def test_further_splits_are_of_all_that_is_held_out(change: Any, message: str, cub_root: Path) -> None:
    path = cub_root / 'dev_test_split.txt'
    path.write_text('\n'.join(change(path.read_text().splitlines())))
    with pytest.raises(DataError, match=message):
        CUBDataset(str(cub_root), split='test', split_file='dev_test_split.txt')


@pytest.mark.parametrize(
    ('settings', 'told'),
    [
        (dict(data_root=None), 'CUBDataset: data_root must be a string or a Path, got None'),
        (dict(split=None), 'CUBDataset: split must be a string, got None'),
        (dict(split_file=5), 'CUBDataset: split_file must be a string or None, got 5'),
        (dict(crop='yes'), "CUBDataset: crop must be True or False, got 'yes'"),
    ],
)
def test_settings_of_other_types(settings: dict[str, Any], told: str, cub_root: Path) -> None:
    with pytest.raises(RecipeError, match=told):
        CUBDataset(**{'data_root': str(cub_root), **settings})


def test_what_a_config_says_of_the_data_is_added_to_its_classes(cub_root: Path) -> None:
    about = CUBDataset(str(cub_root), metainfo=dict(source='field')).metainfo
    assert about['source'] == 'field' and len(about['classes']) == 3


def test_floating_point_pixels_are_left_out_with_what_cannot_be_decoded(cub_root: Path) -> None:
    path = cub_root / 'images/002.Laysan_Albatross/bird_5.jpg'
    Image.fromarray(np.zeros((3, 5), np.float32)).save(path, format='TIFF')
    assert numbers(CUBDataset(str(cub_root), corrupt='skip')) == [1, 2, 3, 4, 6]


@pytest.mark.parametrize(
    ('file', 'line', 'message'),
    [
        ('image_class_labels.txt', '1 x', "'x' for image 1, no number from 1 to 3 as classes.txt"),
        ('image_class_labels.txt', '1 0', "image_class_labels.txt has '0' for image 1, no number from 1 to 3"),
        ('image_class_labels.txt', '1 4', "image_class_labels.txt has '4' for image 1, no number from 1 to 3"),
        pytest.param('image_class_labels.txt', f'1 {"9" * 5000}', "'9{40}' for image 1, no number", id='long label'),
        pytest.param('images.txt', f'{"9" * 5000} x.jpg', "images.txt holds '9{80}' where NUMBER", id='long number'),
        ('bounding_boxes.txt', '1 2.0 3.0 4.0', "'2.0 3.0 4.0' for image 1, not X Y WIDTH HEIGHT"),
        ('bounding_boxes.txt', '99 1 1 1 1', "'' for image 1, not X Y"),
        ('bounding_boxes.txt', '1 nan 1 1 1', "'nan 1 1 1' for image 1, not X Y"),
        ('bounding_boxes.txt', '1 1 1 -2 1', "'1 1 -2 1' for image 1, not X Y"),
        ('image_class_labels.txt', '1 ²', "'²' for image 1, no number"),
        ('images.txt', '2 001.Black_footed_Albatross/bird_1.jpg', 'images.txt has image 2 more than once'),
        ('classes.txt', '4 001.Black_footed_Albatross', 'classes.txt has 3 classes and none of number 1'),
        ('train_test_split.txt', '1 true', "train_test_split.txt has '1 true', where the image is 1 for train"),
    ],
)
def test_labels_and_boxes_that_cannot_be(file: str, line: str, message: str, cub_root: Path) -> None:
    lines = (cub_root / file).read_text().splitlines()
    (cub_root / file).write_text('\n'.join([line, *lines[1:]]) + '\n')
    with pytest.raises(DataError, match=message):
        CUBDataset(str(cub_root), crop=True)
