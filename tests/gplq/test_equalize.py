"""Queries and keys are evened out exactly, or not at all."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import gplq
from gplq import equalize
from gplq.batches import default_forward
from gplq.equalize import equalize_queries_and_keys
from gplq.quantizer import Quantizer
from gplq.record import named_quantizers
from gplq.spec import QuantizerSpec


def unbalanced(model: nn.Module) -> nn.Module:
    """A few query channels much larger than the keys they meet; the function stays."""
    with torch.no_grad():
        for block in model.blocks:  # type: ignore[union-attr]
            qkv = block.attn.qkv
            for row in (1, 9):
                qkv.weight[row] *= 32
                qkv.bias[row] *= 32
                qkv.weight[16 + row] /= 32
                qkv.bias[16 + row] /= 32
    return model


def prepared(model: nn.Module, images: Tensor) -> nn.Module:
    gplq.prepare(model, 'w4a4', images[:2])
    return model


@pytest.mark.parametrize('fused', [False, True])
def test_the_function_stays_and_the_rows_meet(toy_vit: Callable[..., nn.Module], images: Tensor, fused: bool) -> None:
    model = prepared(unbalanced(toy_vit(fused=fused)), images)
    with torch.no_grad():
        expected = model(images)
        assert equalize_queries_and_keys(model, [images], default_forward) == 2
        assert torch.allclose(model(images), expected, atol=1e-4)
        norm = model.blocks[0].norm1  # type: ignore[index, union-attr]
        attention = model.blocks[0].attn  # type: ignore[index, union-attr]
        patches = model.patch_embed(images).flatten(2).transpose(1, 2)  # type: ignore[operator]
        q, k, _ = attention.qkv(norm(patches)).chunk(3, -1)
    # The queries meet the keys after their factor 1 / sqrt(8); it is the same for every channel.
    ratio = q.abs().amax((0, 1)) / k.abs().amax((0, 1))
    assert torch.allclose(ratio, torch.full((16,), 8**0.5), rtol=1e-3)


@pytest.mark.parametrize('settings', [{'relative': True}, {'norm': True}], ids=str)
def test_refused_where_something_else_reads_queries(
    toy_vit: Callable[..., nn.Module], images: Tensor, settings: dict[str, bool]
) -> None:
    model = prepared(unbalanced(toy_vit(**settings)), images)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        assert equalize_queries_and_keys(model, [images], default_forward) == 0
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())


class Rotary(nn.Module):
    """An attention whose queries and keys are rotated by their position."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 2
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 2, 8).permute(2, 0, 3, 1, 4)
        angle = torch.arange(n)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.03])

        def rotate(t: Tensor) -> Tensor:
            a, c = t.chunk(2, -1)
            return torch.cat([a * angle.cos() - c * angle.sin(), a * angle.sin() + c * angle.cos()], -1)

        y = (rotate(q) @ rotate(k).transpose(-2, -1)).softmax(-1) @ v
        return y.transpose(1, 2).reshape(b, n, 16)


def test_refused_with_rotary_embeddings() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Rotary(), nn.Linear(16, 16)).eval()
    with torch.no_grad():
        model[0].qkv.weight[1] *= 32
        model[0].qkv.weight[17] /= 32
    x = torch.randn(8, 6, 16)
    gplq.prepare(model, 'w4a4', x)
    with torch.no_grad():
        assert equalize_queries_and_keys(model, [x], default_forward) == 0


class TwoProducts(nn.Module):
    """Two attentions in one module; relative positions may read the second one's queries."""

    def __init__(self, relative: bool) -> None:
        super().__init__()
        self.relative = relative
        self.layers = nn.ModuleDict({name: nn.Linear(16, 16) for name in ('q1', 'k1', 'v1', 'q2', 'k2', 'v2')})
        self.position = nn.Parameter(torch.randn(6, 8))

    def forward(self, x: Tensor) -> Tensor:
        q1, k1, v1, q2, k2, v2 = (layer(x).unflatten(-1, (2, 8)).transpose(1, 2) for layer in self.layers.values())
        y = (q1 @ k1.transpose(-2, -1)).softmax(-1) @ v1
        scores = q2 @ k2.transpose(-2, -1)
        if self.relative:
            scores = scores + q2 @ self.position.t()
        y = y + scores.softmax(-1) @ v2
        return y.transpose(1, 2).flatten(2)


class Around(nn.Module):
    """An attention that another one runs in the midst of its own products."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-2, -1)).softmax(-1)
        y: Tensor = scores @ v
        return self.inner(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


@pytest.mark.parametrize(('kind', 'count'), [('relative', 1), ('two products', 2), ('nested', 2)])
def test_modules_with_more_than_one_product(kind: str, count: int, toy_vit: Callable[..., nn.Module]) -> None:
    torch.manual_seed(0)
    if kind == 'nested':
        made: nn.Module = Around(unbalanced(toy_vit(depth=1)).blocks[0].attn)  # type: ignore[index, union-attr]
    else:
        made = TwoProducts(relative=kind == 'relative')
        with torch.no_grad():
            for name, layer in made.layers.items():
                layer.weight[1] *= {'q': 32, 'k': 1 / 32, 'v': 1}[name[0]]
    model = nn.Sequential(made, nn.Linear(16, 16)).eval()
    x = torch.randn(8, 6, 16)
    gplq.prepare(model, 'w4a4', x)
    with torch.no_grad():
        expected = model(x)
        changed = equalize_queries_and_keys(model, [x], default_forward)
        assert torch.allclose(model(x), expected, atol=1e-5)
    assert changed == count


class Text(nn.Module):
    """Every image looks at one text."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        q, k, v = (
            layer(t).unflatten(-1, (2, 8)).transpose(1, 2)
            for layer, t in ((self.query, x), (self.key, text), (self.value, text))
        )
        y = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return y.transpose(1, 2).flatten(2)


def test_keys_that_images_share(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Text().eval()
    with torch.no_grad():
        model.query.weight[1] *= 32
        model.key.weight[1] /= 32
    batch = {'x': torch.randn(4, 6, 16), 'text': torch.randn(1, 5, 16)}
    gplq.prepare(model, gplq.Recipe.gplq(), forward=lambda m: m(**batch))
    # Less than one head's map at once.
    monkeypatch.setattr('gplq.fused_attention._CHUNK', {'cpu': 1})
    with torch.no_grad():
        expected = model(**batch)
        assert equalize_queries_and_keys(model, [batch], default_forward) == 1
        assert torch.allclose(model(**batch), expected, atol=1e-5)


class Leaking(nn.Module):
    """An attention whose keys somebody else reads as well."""

    def __init__(self, key: nn.Linear, way: str) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(16, 16), key, nn.Linear(16, 16)
        self.way = way
        self.last = torch.empty(0)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (layer(x).unflatten(-1, (2, 8)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        self.last = k.mean(1)
        y = ((q @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(1, 2).flatten(2)
        return y, self.last if self.way == 'output' else y


class Reading(nn.Module):
    """Two of them."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        first = Leaking(nn.Linear(16, 16), way)
        self.first, self.second = first, Leaking(first.key if way == 'shared' else nn.Linear(16, 16), way)

    def forward(self, x: Tensor) -> Tensor:
        y, other = self.first(x)
        z, _ = self.second(y)
        if self.way == 'output':
            z = z + other.mean()
        if self.way == 'attribute':
            z = z * (1 + self.first.last.abs().mean())
        return z  # type: ignore[no-any-return]


@pytest.mark.parametrize('way', ['output', 'attribute', 'shared', 'nobody'])
def test_keys_that_others_read(way: str) -> None:
    torch.manual_seed(0)
    model = Reading(way).eval()
    with torch.no_grad():
        for attention in (model.first, model.second):
            attention.query.weight[1] *= 32
        model.first.key.weight[1] /= 32
        if way != 'shared':
            model.second.key.weight[1] /= 32
    x = torch.randn(8, 6, 16)
    gplq.prepare(model, 'w4a4', x)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        expected = model(x)
        changed = equalize_queries_and_keys(model, [x], default_forward)
        assert torch.allclose(model(x), expected, atol=1e-5)
    assert (changed > 0) == (way == 'nobody')
    if not changed:
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_the_hooks_of_a_user_run_once_on_an_input(toy_vit: Callable[..., nn.Module], images: Tensor) -> None:
    model = prepared(unbalanced(toy_vit()), images)
    attention = model.blocks[0].attn  # type: ignore[index, union-attr]
    attention.register_forward_pre_hook(lambda module, args: (args[0] * 3,))  # type: ignore[union-attr]
    seen = []
    attention.qkv.register_forward_hook(lambda module, args, y: seen.append(float(args[0].norm())))  # type: ignore[union-attr]
    equalize_queries_and_keys(model, [images], default_forward)
    assert len(seen) > 3
    assert seen == pytest.approx([seen[0]] * len(seen))


def test_the_error_in_parts_is_that_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    quantizers = tuple(Quantizer(QuantizerSpec(4, signed=True), (2, 1, 1)) for _ in range(2))
    query, key = torch.randn(3, 2, 6, 8), torch.randn(3, 2, 5, 8)
    whole = equalize._error(quantizers, query, key)  # type: ignore[arg-type]
    monkeypatch.setattr('gplq.fused_attention._CHUNK', {'cpu': 1})
    assert equalize._error(quantizers, query, key) == pytest.approx(whole)  # type: ignore[arg-type]
    assert whole > 0


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize('fails', [False, True])
def test_nothing_is_left_behind(toy_vit: Callable[..., nn.Module], images: Tensor, fails: bool) -> None:
    model = prepared(unbalanced(toy_vit()), images)
    before = hooks_of(model)

    def forward(m: nn.Module, batch: Tensor) -> None:
        m(batch)
        if fails:
            raise ValueError('broken')

    with pytest.raises(ValueError, match='broken') if fails else contextlib.nullcontext():
        equalize_queries_and_keys(model, [images], forward)
    assert hooks_of(model) == before
    assert all(quantizer.observer is None for _, quantizer in named_quantizers(model))
