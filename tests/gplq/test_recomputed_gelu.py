"""A GELU that keeps nothing: its values and gradients, what it keeps, and where it must do as any other."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import gplq
from gplq.functional import fake_quantize
from gplq.grid import Grid
from gplq.layers import RecomputedGELU
from gplq.quantized_linear import quantized_linear, source_of
from gplq.recomputed_gelu import recomputed_gelu


def leaves(offset: bool) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 8, generator=generator)
    weight = torch.randn(32, 8, generator=generator)
    tensors = [x, weight, torch.randn(32, generator=generator), torch.tensor(0.3)]
    if offset:
        tensors.append(torch.tensor(0.2))
    return [t.requires_grad_() for t in tensors]


def grid_of(scale: Tensor, *offset: Tensor) -> Grid:
    return Grid(scale, -8, 7, offset[0] if offset else None, 0.5)


@pytest.mark.parametrize('approximate', ['none', 'tanh'])
@pytest.mark.parametrize('offset', [False, True])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_those_of_the_gelu(dtype: torch.dtype, offset: bool, approximate: str) -> None:
    found = []
    for recomputed in (True, False):
        tensors = leaves(offset)
        x, weight, bias, scale, *rest = tensors
        with torch.autocast('cpu', dtype, enabled=dtype is torch.bfloat16):
            hidden = quantized_linear(x, weight, bias, grid_of(scale, *rest))
            source = source_of(hidden)
            assert source is not None
            y = recomputed_gelu(hidden, source, approximate) if recomputed else F.gelu(hidden, approximate=approximate)
        assert y.dtype == dtype
        y.float().square().sum().backward()
        found.append((y, *(t.grad for t in tensors)))
    for a, b in zip(*found, strict=True):
        assert a is not None and b is not None
        assert torch.equal(a, b)


def test_gradients_are_those_of_the_operations_written_out() -> None:
    found = []
    for fused in (True, False):
        x, weight, bias, scale = tensors = leaves(offset=False)
        if fused:
            hidden = quantized_linear(x, weight, bias, grid_of(scale))
            source = source_of(hidden)
            assert source is not None
            y = recomputed_gelu(hidden, source, 'none')
        else:
            y = F.gelu(F.linear(fake_quantize(x, scale, -8, 7, None, 0.5), weight, bias))
        y.square().sum().backward()
        found.append([t.grad for t in tensors])
    for a, b in zip(*found, strict=True):
        assert a is not None and b is not None
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)


def mlp(images: Tensor) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 4))
    gplq.prepare(model, 'w4a4', images)
    gplq.calibrate(model, [images])
    return model.train()


@pytest.mark.parametrize('prepared', [False, True])
def test_what_is_kept_of_the_hidden_values(prepared: bool) -> None:
    images = torch.randn(6, 8)
    model = mlp(images) if prepared else nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 4))
    hidden: list[torch.dtype] = []

    def keep(tensor: Tensor) -> Tensor:
        if tensor.numel() == 6 * 32:
            hidden.append(tensor.dtype)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(images)
    # Prepared, the second layer keeps its input's rounding errors, a byte each, and eight bits of codes.
    assert hidden == ([torch.uint8] * 2 if prepared else [torch.float32] * 2)


def gradients_of(model: nn.Module, run: Callable[[], Tensor]) -> list[Tensor]:
    model.zero_grad()
    run().square().sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize('reentrant', [False, True])
def test_checkpointed(reentrant: bool) -> None:
    images = torch.randn(6, 8, requires_grad=True)
    model = mlp(images.detach())
    expected = gradients_of(model, lambda: model(images))
    found = gradients_of(model, lambda: checkpoint(model, images, use_reentrant=reentrant))
    assert len(found) == len(expected) > 0
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_what_was_changed_in_place_is_kept() -> None:
    images = torch.randn(6, 8)
    model = mlp(images)
    first, gelu, last = model.children()

    def changed(plain: bool) -> Tensor:
        hidden = first(images)
        hidden += 1.0
        assert source_of(hidden) is None
        result: Tensor = last(F.gelu(hidden) if plain else gelu(hidden))
        return result

    expected = gradients_of(model, lambda: changed(True))
    assert all(map(torch.equal, gradients_of(model, lambda: changed(False)), expected))


def test_without_gradients_nothing_is_remembered() -> None:
    images = torch.randn(6, 8)
    model = mlp(images)
    with torch.no_grad():
        assert source_of(model[0](images)) is None  # type: ignore[index]
        assert torch.equal(model(images), model.eval()(images))


def test_copies_and_pickles() -> None:
    images = torch.randn(6, 8)
    model = mlp(images)
    assert isinstance(model[1], RecomputedGELU)  # type: ignore[index]
    expected = model(images)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(images), expected)


def test_classes_of_others_stay() -> None:
    class Own(nn.GELU):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    model = nn.Sequential(nn.Linear(8, 32), Own(), nn.Linear(32, 4))
    gplq.prepare(model, 'w4a4', torch.randn(2, 8))
    assert type(model[1]) is Own


def test_runs_in_inference_mode() -> None:
    images = torch.randn(6, 8)
    model = mlp(images).eval()
    with torch.no_grad():
        expected = model(images)
    with torch.inference_mode():
        assert torch.equal(model(images), expected)


def test_an_output_is_saved_without_what_it_was_computed_from() -> None:
    images = torch.randn(6, 8)
    model, file = mlp(images), io.BytesIO()
    torch.save(model(images), file)
    file.seek(0)
    assert torch.load(file, weights_only=True).shape == (6, 4)
