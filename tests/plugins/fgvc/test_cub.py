"""CUB's files, read as they are published."""

from __future__ import annotations

from pathlib import Path

import pytest

from gplq.errors import DataError
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
    ('file', 'line', 'message'),
    [
        ('image_class_labels.txt', '1 x', "'x' for image 1, no number"),
        ('image_class_labels.txt', '1 0', 'label -1 is none of the 3 classes'),
        ('image_class_labels.txt', '1 4', 'label 3 is none of the 3 classes'),
        ('bounding_boxes.txt', '1 2.0 3.0 4.0', "'2.0 3.0 4.0' for image 1, not X Y WIDTH HEIGHT"),
        ('bounding_boxes.txt', '99 1 1 1 1', "'' for image 1, not X Y"),
        ('bounding_boxes.txt', '1 nan 1 1 1', "'nan 1 1 1' for image 1, not X Y"),
        ('bounding_boxes.txt', '1 1 1 -2 1', "'1 1 -2 1' for image 1, not X Y"),
        ('image_class_labels.txt', '1 ²', "'²' for image 1, no number"),
        ('images.txt', '2 001.Black_footed_Albatross/bird_1.jpg', 'images.txt has image 2 more than once'),
        ('train_test_split.txt', '1 true', "train_test_split.txt has '1 true', where the image is 1 for train"),
    ],
)
def test_labels_and_boxes_that_cannot_be(file: str, line: str, message: str, cub_root: Path) -> None:
    lines = (cub_root / file).read_text().splitlines()
    (cub_root / file).write_text('\n'.join([line, *lines[1:]]) + '\n')
    with pytest.raises(DataError, match=message):
        CUBDataset(str(cub_root), crop=True)
