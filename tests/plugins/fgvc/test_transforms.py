"""Pipelines of timm's and torchvision's transforms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gplq.errors import DataError, RecipeError
from gplq.plugins.fgvc import LoadImage, PackImage, TimmTransform, TorchvisionTransform

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def test_timms_evaluation_normalizes() -> None:
    image = Image.fromarray(np.full((40, 40, 3), 255, np.uint8))
    step = TimmTransform(input_size=(3, 32, 32), is_training=False, mean=MEAN, std=STD, crop_pct=1.0)
    found = step({'img': image})['img']
    assert tuple(found.shape) == (3, 32, 32)
    assert torch.allclose(found[:, 5, 7], (1 - torch.tensor(MEAN)) / torch.tensor(STD), atol=1e-5)


@pytest.mark.parametrize(
    'options',
    [dict(inputsize=32), dict(input_size=32, interpolation='bicubc'), dict(is_training=True, auto_augment='x')],
)
def test_what_timm_does_not_take(options: dict[str, object]) -> None:
    with pytest.raises(RecipeError, match=f'TimmTransform: timm does not take .*{list(options)[-1]}'):
        TimmTransform(**options)


def test_torchvisions_transforms_by_name() -> None:
    image = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    step = TorchvisionTransform([dict(type='CenterCrop', size=2), dict(type='PILToTensor')])
    expected = torch.from_numpy(np.asarray(image)[1:3, 1:3].copy()).permute(2, 0, 1)
    assert torch.equal(step({'img': image})['img'], expected)
    with pytest.raises(ValueError, match="no transform 'CentreCrop'"):
        TorchvisionTransform([dict(type='CentreCrop', size=2)])


def test_grey_images_are_read_in_three_channels(tmp_path: Path) -> None:
    Image.fromarray(np.full((3, 5), 7, np.uint8)).save(tmp_path / 'grey.png')
    packed = PackImage()(LoadImage()({'img_path': str(tmp_path / 'grey.png'), 'gt_label': 4}))
    assert packed['inputs'].mode == 'RGB' and packed['labels'] == 4 and packed['img_path'].endswith('grey.png')


def test_boxes_that_reach_beyond_the_image_are_cut_and_those_outside_of_it_refused(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((3, 5), np.uint8)).save(tmp_path / 'a.png')
    for box, size in (([4.0, 2.0, 9.0, 9.0], (1, 1)), ([-4.0, -4.0, 6.0, 5.0], (2, 1)), ([1.0, 1.0, 0.2, 0.2], (1, 1))):
        assert LoadImage()({'img_path': str(tmp_path / 'a.png'), 'box': box})['img'].size == size
    for box in ([9.0, 1.0, 2.0, 2.0], [1.0, 3.0, 2.0, 2.0], [-4.0, 1.0, 4.0, 1.0], [1.0, -4.0, 1.0, 1.0]):
        with pytest.raises(DataError, match=r'a.png has 5 x 3 pixels and its box .* = \[.*\] lies outside of it'):
            LoadImage(margin=9.0)({'img_path': str(tmp_path / 'a.png'), 'box': box})


def test_kinds_of_interpolation_and_numbers_go_by_their_names() -> None:
    image = Image.fromarray(np.full((4, 4, 3), 51, np.uint8))
    steps = [
        dict(type='Resize', size=2, interpolation='bicubic'),
        dict(type='ToImage'),
        dict(type='ToDtype', dtype='float32', scale=True),
    ]
    found = TorchvisionTransform(steps)({'img': image})['img']
    assert found.dtype == torch.float32 and torch.allclose(found, torch.full((3, 2, 2), 0.2))
    for step, message in (
        (dict(size=2), 'no transform None'),
        (dict(type='functional'), "no transform 'functional'"),
        (dict(type='Resize', length=2), 'Resize does not take .*length'),
        (dict(type='ToDtype', dtype='float33'), "ToDtype does not take .*torch has no 'float33'"),
    ):
        with pytest.raises(RecipeError, match=message):
            TorchvisionTransform([step])


@pytest.mark.parametrize('margin', ['x', float('nan'), float('inf'), -0.1, True])
def test_margins_that_cannot_be(margin: Any) -> None:
    with pytest.raises(RecipeError, match='LoadImage: margin.* must be a number'):
        LoadImage(margin=margin)


@pytest.mark.parametrize('transforms', [['Resize'], dict(type='Resize', size=2), 'Resize', 5])
def test_transforms_are_a_list_of_dicts(transforms: Any) -> None:
    with pytest.raises(RecipeError, match=r'transforms=.*Resize|5.* must be a list of dicts'):
        TorchvisionTransform(transforms)


@pytest.mark.parametrize('step', [TimmTransform(), TorchvisionTransform([dict(type='ToImage')]), PackImage()])
def test_a_pipeline_without_a_step_that_reads_the_image(step: Any) -> None:
    with pytest.raises(RecipeError, match=f'{type(step).__name__}: no step .* put LoadImage first'):
        step({'img_path': 'a.png', 'gt_label': 0})


@pytest.mark.parametrize(('kind', 'name'), [(np.uint16, 'a.png'), (np.int32, 'a.tiff')])
def test_eight_bits_of_grey_in_more_stay_as_they_are(kind: Any, name: str, tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 7, 255]], kind)).save(tmp_path / name)
    picture = LoadImage()({'img_path': str(tmp_path / name)})['img']
    assert np.asarray(picture)[0, :, 0].tolist() == [0, 7, 255]


def test_floating_point_pixels_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0.0, 0.5, 1.0]], np.float32)).save(tmp_path / 'a.tiff')
    with pytest.raises(DataError, match='a.tiff cannot be read as an image: its pixels are floating point'):
        LoadImage()({'img_path': str(tmp_path / 'a.tiff')})


@pytest.mark.parametrize('values', [[0, 65536], [-1, 7]])
def test_pixels_of_more_than_sixteen_bits_are_refused(values: list[int], tmp_path: Path) -> None:
    Image.fromarray(np.array([values], np.int32)).save(tmp_path / 'a.tiff')
    told = f'a.tiff cannot be read as an image: its pixels go from {min(values)} to {max(values)}'
    with pytest.raises(DataError, match=told):
        LoadImage()({'img_path': str(tmp_path / 'a.tiff')})


def test_sixteen_bits_of_grey_become_eight(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 256, 40000, 65535]], np.uint16)).save(tmp_path / 'deep.png')
    picture = LoadImage()({'img_path': str(tmp_path / 'deep.png')})['img']
    assert np.asarray(picture)[0, :, 0].tolist() == [0, 1, 156, 255]
