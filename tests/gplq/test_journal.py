"""A weight stage that was killed goes on behind its last finished step and ends at the same bits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gplq
from gplq import compensation, weight_stage
from gplq.journal import Journal
from gplq.serialization import describe


class Killed(Exception):
    pass


def dying(function: Callable[..., Any], after: int, calls: list[int]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if len(calls) == after:
            raise Killed
        calls.append(1)
        return function(*args, **kwargs)

    return run


@pytest.fixture
def calibrated(toy_vit: Callable[..., nn.Module], images: Tensor) -> Callable[[str], nn.Module]:
    def make(kind: str) -> nn.Module:
        model = toy_vit(width=32)
        gplq.prepare(model, gplq.Recipe.gplq(3, 3, compensation=kind, exponents=(0.0, 1.0)), images[:2])
        gplq.calibrate(model, [images])
        return model

    return make


@pytest.mark.parametrize(
    ('kind', 'step', 'after'),
    [
        ('none', (weight_stage, 'round_view'), 4),
        ('qwt', (compensation, '_fit_block'), 1),
        ('ridge', (compensation, '_refit'), 1),
        ('affine', (compensation, '_absorb_affine'), 3),
    ],
)
def test_killed_and_called_again(
    calibrated: Callable[[str], nn.Module],
    images: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    step: tuple[Any, str],
    after: int,
) -> None:
    start = calibrated(kind)
    whole = copy.deepcopy(start)
    done: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(*step, dying(getattr(*step), -1, done))
        gplq.quantize_weights(whole, [images])
    broken, calls = copy.deepcopy(start), []
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(*step, dying(getattr(*step), after, calls))
        gplq.quantize_weights(broken, [images], journal=tmp_path / 'journal')
    resumed = copy.deepcopy(start)
    with monkeypatch.context() as patch:
        patch.setattr(*step, dying(getattr(*step), -1, calls))
        gplq.quantize_weights(resumed, [images], journal=tmp_path / 'journal')
    assert len(calls) == len(done) > after, 'no step was done twice'
    assert describe(resumed) == describe(whole)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name
    with torch.no_grad():
        assert torch.equal(resumed(images), whole(images))


def test_steps_found_on_other_batches_are_forgotten(
    toy_vit: Callable[..., nn.Module], images: Tensor, tmp_path: Path
) -> None:
    def quantized(batch: Tensor, journal: Path | None) -> nn.Module:
        model = toy_vit(depth=1)
        gplq.prepare(model, 'w3a4', images[:2])
        gplq.calibrate(model, [images])
        gplq.quantize_weights(model, [batch], journal=journal)
        return model

    other = 3 * images.flip(-1) + 1
    quantized(images, tmp_path / 'journal')
    found, expected = quantized(other, tmp_path / 'journal').state_dict(), quantized(other, None).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    assert any(not torch.equal(value, expected[name]) for name, value in quantized(images, None).state_dict().items())


def test_steps_of_another_start_are_forgotten(tmp_path: Path) -> None:
    journal = Journal(tmp_path / 'journal', 'one')
    journal.note('round a/b:linear', {'weight': torch.ones(2)})
    assert Journal(tmp_path / 'journal', 'one').recall('round a/b:linear') is not None
    assert Journal(tmp_path / 'journal', 'other').recall('round a/b:linear') is None
    assert Journal(tmp_path / 'journal', 'one').recall('round a/b:linear') is None


def test_a_damaged_step_is_done_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path / 'journal', 'one')
    journal.note('a', {'weight': torch.ones(2)})
    (file,) = (tmp_path / 'journal').glob('*.safetensors')
    file.write_bytes(file.read_bytes()[:20])
    assert journal.recall('a') is None


def test_a_step_whose_file_was_changed_is_done_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path / 'journal', 'one')
    journal.note('a', {'weight': torch.ones(2)})
    (file,) = (tmp_path / 'journal').glob('*.safetensors')
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert journal.recall('a') is None
