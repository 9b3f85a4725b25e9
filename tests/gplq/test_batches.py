"""Batches of every shape a loader gives: their size, their device, how many are read."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import gplq
from gplq.batches import batch_size, bounded, default_forward, first_samples, rereadable, to_device
from gplq.errors import CalibrationError

Make = Callable[..., nn.Module]


class Batch(NamedTuple):
    """What a collate function of one's own may return."""

    inputs: Tensor
    labels: Tensor


IMAGES = torch.zeros(4, 3, 2, 2)


@pytest.mark.parametrize(
    ('batch', 'size'),
    [
        (IMAGES, 4),
        ((IMAGES, torch.zeros(4)), 4),
        (Batch(IMAGES, torch.zeros(4)), 4),
        ({'labels': torch.zeros(1), 'inputs': IMAGES}, 4),
        ({'pixel_values': IMAGES}, 4),
        ([IMAGES[0], IMAGES[1]], 2),
        ([], 0),
        (None, 0),
    ],
    ids=str,
)
def test_size(batch: Any, size: int) -> None:
    assert batch_size(batch) == size


@pytest.mark.parametrize(
    'batch', [Batch(IMAGES, IMAGES), (IMAGES, 'name'), [IMAGES, 3], {'inputs': [IMAGES]}, IMAGES, None], ids=type
)
def test_a_batch_keeps_its_type_on_another_device(batch: Any) -> None:
    moved = to_device(batch, torch.device('meta'))
    assert type(moved) is type(batch)
    first = next(iter(moved.values()))[0] if isinstance(moved, dict) else moved
    first = first[0] if isinstance(first, (list, tuple)) else first
    assert first is None or first.device.type == 'meta'


def test_no_batch_is_drawn_that_is_not_needed() -> None:
    drawn: list[int] = []

    def endless() -> Iterator[Tensor]:
        for number in itertools.count():
            drawn.append(number)
            yield IMAGES

    assert len(list(first_samples(endless(), 8))) == 2
    assert drawn == [0, 1]
    assert len(list(bounded(endless(), 9))) == 3
    assert len(list(rereadable(endless(), 1))) == 1


def test_what_can_be_read_again_is_not_copied() -> None:
    batches = [IMAGES] * 3
    assert rereadable(batches, 1) is batches


def test_no_batch_and_empty_batches_are_refused() -> None:
    with pytest.raises(CalibrationError, match='no calibration batch'):
        list(bounded([], 4))
    with pytest.raises(CalibrationError, match='batch 1 is empty'):
        list(bounded([IMAGES, IMAGES[:0]], 8))


@pytest.mark.parametrize('kind', ['tensor', 'tuple', 'named', 'mapping'])
def test_the_model_takes_every_kind(toy_vit: Make, images: Tensor, kind: str) -> None:
    model = toy_vit(depth=1)
    labels = torch.zeros(len(images))
    kinds = {'tensor': images, 'tuple': (images, labels), 'named': Batch(images, labels), 'mapping': {'x': images}}
    assert torch.equal(default_forward(model, kinds[kind]), model(images))


@pytest.mark.parametrize('compensation', ['none', 'qwt'])
def test_both_stages_read_an_endless_stream(toy_vit: Make, images: Tensor, compensation: str) -> None:
    """The sample limit ends it, and what was read of it serves every pass."""
    recipe = gplq.Recipe.gplq(calibration_samples=8, compensation=compensation)
    models = []
    for batches in (lambda: itertools.repeat(images[:4]), lambda: [images[:4]] * 2):
        model = toy_vit(depth=1)
        gplq.prepare(model, recipe, images[:2])
        gplq.calibrate(model, batches())
        gplq.quantize_weights(model, batches())
        models.append(model)
    assert torch.equal(models[0](images), models[1](images))
