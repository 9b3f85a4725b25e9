"""``nn.MultiheadAttention`` taken apart computes what torch's does, in all its modes, and can be quantized."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gplq
from gplq import integer
from gplq.layers import DecomposedMultiheadAttention
from gplq.record import named_products, weight_views
from gplq.swap import swap_class

WIDTH, HEADS, BATCH, TARGETS, SOURCES = 12, 3, 2, 4, 5


def taken_apart(attention: nn.MultiheadAttention) -> nn.MultiheadAttention:
    twin = copy.deepcopy(attention)
    swap_class(twin, DecomposedMultiheadAttention)
    return twin


def masks(**settings: Any) -> dict[str, Any]:
    """A key padding mask and an attention mask in which no row is masked in full."""
    generator = torch.Generator().manual_seed(0)
    attention = torch.rand(TARGETS, SOURCES, generator=generator) > 0.6
    attention[:, 0] = False
    padding = torch.zeros(BATCH, SOURCES, dtype=torch.bool)
    padding[1, -2:] = True
    return {
        'none': {},
        'attention': {'attn_mask': attention},
        'attention_float': {'attn_mask': torch.randn(TARGETS, SOURCES, generator=generator)},
        'a_head': {'attn_mask': attention.expand(BATCH * HEADS, -1, -1).clone()},
        'padding': {'key_padding_mask': padding},
        'both': {'attn_mask': attention, 'key_padding_mask': padding},
        'both_float': {
            'attn_mask': torch.zeros(TARGETS, SOURCES).masked_fill(attention, float('-inf')),
            'key_padding_mask': torch.zeros(BATCH, SOURCES).masked_fill(padding, float('-inf')),
        },
    }


@pytest.mark.parametrize('mask', sorted(masks()))
@pytest.mark.parametrize('batch_first', [False, True])
@pytest.mark.parametrize(
    'settings',
    [
        {},
        {'bias': False},
        {'add_bias_kv': True},
        {'add_zero_attn': True},
        {'add_bias_kv': True, 'add_zero_attn': True},
        {'kdim': 7, 'vdim': 9},
        {'kdim': 7, 'bias': False},
    ],
    ids=str,
)
def test_equals_torch(settings: dict[str, Any], batch_first: bool, mask: str) -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first, **settings).eval()
    with torch.no_grad():
        for p in attention.parameters():
            p.copy_(torch.randn_like(p) * 0.4)
    shape = (BATCH, -1, TARGETS, SOURCES)
    query = torch.randn(shape[0], TARGETS, WIDTH)
    key = torch.randn(BATCH, SOURCES, settings.get('kdim', WIDTH))
    value = torch.randn(BATCH, SOURCES, settings.get('vdim', WIDTH))
    if not batch_first:
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    twin = taken_apart(attention)
    for average in (True, False):
        arguments = {**masks()[mask], 'average_attn_weights': average}
        expected, expected_weights = attention(query, key, value, **arguments)
        found, weights = twin(query, key, value, **arguments)
        assert torch.allclose(found, expected, atol=1e-5)
        assert torch.allclose(weights, expected_weights, atol=1e-6)
        assert weights.shape == expected_weights.shape


def test_equals_torch_without_weights_and_causal() -> None:
    attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).eval()
    x = torch.randn(BATCH, TARGETS, WIDTH)
    causal = nn.Transformer.generate_square_subsequent_mask(TARGETS)
    arguments: dict[str, Any] = {'attn_mask': causal, 'is_causal': True, 'need_weights': False}
    expected, none = attention(x, x, x, **arguments)
    found, weights = taken_apart(attention)(x, x, x, **arguments)
    assert none is weights is None
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize('mask', ['none', 'attention', 'padding'])
def test_equals_torch_unbatched(mask: str) -> None:
    attention = nn.MultiheadAttention(WIDTH, HEADS).eval()
    query, key = torch.randn(TARGETS, WIDTH), torch.randn(SOURCES, WIDTH)
    arguments = masks()[mask]
    if 'key_padding_mask' in arguments:
        arguments['key_padding_mask'] = arguments['key_padding_mask'][1]
    expected, expected_weights = attention(query, key, key, **arguments)
    found, weights = taken_apart(attention)(query, key, key, **arguments)
    assert found.shape == expected.shape and weights.shape == expected_weights.shape
    assert torch.allclose(found, expected, atol=1e-6)
    assert torch.allclose(weights, expected_weights, atol=1e-6)


def test_gradients_equal_torch_s() -> None:
    attention = nn.MultiheadAttention(WIDTH, HEADS)
    twin = taken_apart(attention)
    x = torch.randn(TARGETS, BATCH, WIDTH)
    for module in (attention, twin):
        module(x, x, x)[0].square().sum().backward()
    for (name, p), q in zip(attention.named_parameters(), twin.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        assert torch.allclose(p.grad, q.grad, atol=1e-4), name


class Detector(nn.Module):
    """Self- and cross-attention as in a DETR decoder, the key wider than the query."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, WIDTH)
        self.self_attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.cross_attention = nn.MultiheadAttention(WIDTH, HEADS, kdim=8, vdim=8, batch_first=True)
        self.memory = nn.Linear(6, 8)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        q = self.embed(x)
        q = q + self.self_attention(q, q, q)[0]
        memory = self.memory(x)
        q = q + self.cross_attention(q, memory, memory)[0]
        y: Tensor = self.head(q)
        return y


def test_all_verbs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Detector().eval()
    keys = set(model.state_dict())
    x = torch.randn(16, 9, 6)
    with torch.no_grad():
        expected = model(x)
    plan = gplq.prepare(model, 'w8a8', x[:2])
    assert keys <= set(model.state_dict())
    assert plan.multiheads == ('self_attention', 'cross_attention')
    assert len(plan.products) == 4
    assert sorted(m.kind for m in plan.maps if m.name == 'cross_attention') == ['key', 'query', 'value']
    gplq.calibrate(model, [x])
    gplq.train_activations(
        model,
        [(x, None)],
        loss=lambda m, batch: m(batch[0]).square().mean(),
        stage=gplq.ActivationStage(lr=1e-7, scale_lr=1e-5),
    )
    gplq.quantize_weights(model, [x])
    with torch.no_grad():
        found = model(x)
    assert float((found - expected).norm() / expected.norm()) < 0.03

    seen: dict[str, tuple[Tensor, ...]] = {}
    for _, view in weight_views(model):
        view.map.watcher = lambda a, b, name=view.name: seen.__setitem__(name, (a, b))
    for name, product in named_products(model):
        product.watcher = lambda a, b, c, name=name: seen.__setitem__(name, (a, b, c))
    with torch.no_grad():
        model(x)
    for _, view in weight_views(model):
        a, b = seen[view.name]
        assert torch.allclose(integer.linear_from_codes(view, a), b, atol=1e-5), view.name
    for name, product in named_products(model):
        a, b, c = seen[name]
        assert torch.allclose(integer.product_from_codes(product, a, b), c, atol=1e-5), name

    for _, view in weight_views(model):
        view.map.watcher = None
    for _, product in named_products(model):
        product.watcher = None
    gplq.save(model, tmp_path / 'detector.safetensors')
    with torch.no_grad():
        assert torch.equal(gplq.load(Detector().eval(), tmp_path / 'detector.safetensors')(x), found)


def encoder(**settings: Any) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 24, batch_first=True, dropout=0.0, **settings)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()


@pytest.mark.parametrize('norm_first', [False, True])
def test_encoder_layers_leave_their_fast_path(norm_first: bool) -> None:
    """In inference mode torch's encoder layer calls one fused kernel that would pass every quantizer by."""
    model = encoder(norm_first=norm_first)
    x = torch.randn(8, 5, WIDTH)
    with torch.no_grad():
        expected = model(x)
    plan = gplq.prepare(model, 'w4a4', x[:2])
    assert len(plan.products) == 4
    assert len(plan.maps) == 2 * 6
    gplq.calibrate(model, [x])
    with torch.no_grad():
        found = model(x)
    with torch.enable_grad():
        watched = model(x)
    assert torch.allclose(found, watched, atol=1e-5)
    error = float((found - expected).norm() / expected.norm())
    assert 1e-3 < error < 0.3


def test_projections_of_a_layernorms_output_have_a_scale_a_channel() -> None:
    """`linear_input='post_norm'`: behind a LayerNorm, whatever the attention's class."""

    class PreNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.fc = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
            self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            z: Tensor = self.fc(self.attention(y, y, y, need_weights=False)[0])
            return z

    plan = gplq.prepare(PreNorm().eval(), gplq.Recipe.repq_vit(4, 4), torch.randn(2, 5, WIDTH))
    found = {a_map.kind: a_map.input.spec.granularity for a_map in plan.maps if a_map.name == 'attention'}
    assert found == {'query': 'channel', 'key': 'channel', 'value': 'channel'}
