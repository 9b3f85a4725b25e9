"""What preparation finds, how it attributes it, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gplq
from gplq.errors import CalibrationError, GPLQError, ProductError, RecipeError, StageError, TargetError


def sites(plan: Any) -> dict[str, str]:
    return {m.name: m.input.site for m in plan.maps if m.input is not None}


@pytest.mark.parametrize('fused', [False, True])
def test_sites_of_a_vision_transformer(toy_vit: Callable[..., nn.Module], images: Tensor, fused: bool) -> None:
    model = toy_vit(depth=1, fused=fused)
    plan = gplq.prepare(model, 'w4a4', images[:2])
    assert sites(plan) == {
        'patch_embed': 'patch_embed_input',
        'blocks.0.attn.qkv': 'linear_input',
        'blocks.0.attn.proj': 'linear_input',
        'blocks.0.fc1': 'linear_input',
        'blocks.0.fc2': 'gelu_output',
        'head': 'classifier_input',
    }
    bits = {m.name: (m.weight_bits, m.input.spec.bits) for m in plan.maps if m.input is not None}
    assert bits.pop('patch_embed') == bits.pop('head') == (8, 8)
    assert set(bits.values()) == {(4, 4)}
    query_key, attention_value = plan.products
    assert (query_key.owner, query_key.left.site, query_key.right.site) == ('blocks.0.attn', 'query', 'key')
    assert (attention_value.left.site, attention_value.right.site) == ('attention_map', 'value')
    # Two heads of eight channels; sixteen tokens, two images.
    assert query_key.left.shape == query_key.right.shape == (2, 1, 1)
    assert attention_value.right.shape == (2, 1, 8)
    assert query_key.multiplications == attention_value.multiplications == 2 * 2 * 16 * 16 * 8
    multiplications = {m.name: m.multiplications for m in plan.maps}
    assert multiplications['patch_embed'] == 2 * 16 * 16 * 3 * 16
    assert multiplications['blocks.0.attn.qkv'] == 2 * 16 * 16 * 48
    assert multiplications['head'] == 2 * 16 * 5
    assert plan.blocks == ('blocks.0',)


def test_relative_position_products_stay_in_floating_point(toy_vit: Callable[..., nn.Module], images: Tensor) -> None:
    plan = gplq.prepare(toy_vit(depth=1, relative=True), 'w4a4', images[:2])
    assert len(plan.products) == 2


def test_nothing_changes_before_calibration(toy_vit: Callable[..., nn.Module], images: Tensor) -> None:
    model = toy_vit().train()
    model.blocks[0].eval()  # type: ignore[index]
    state, modes = dict(model.state_dict()), [m.training for m in model.modules()]
    random = torch.random.get_rng_state()
    expected = model.eval()(images)
    for module, mode in zip(model.modules(), modes, strict=True):
        module.training = mode
    modules = list(model.modules())
    gplq.prepare(model, 'w4a4', images[:2])
    assert torch.equal(torch.random.get_rng_state(), random)
    assert [m.training for m in modules] == modes
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    assert isinstance(model.get_submodule('head'), nn.Linear)
    with torch.no_grad():
        assert torch.equal(model.eval()(images), expected)


def test_targets_and_skip(toy_vit: Callable[..., nn.Module], images: Tensor) -> None:
    recipe = gplq.Recipe.gplq(4, 4, targets=('blocks',), skip=('blocks.1', '*.fc2'))
    plan = gplq.prepare(toy_vit(), recipe, images[:2])
    assert set(sites(plan)) == {'blocks.0.attn.qkv', 'blocks.0.attn.proj', 'blocks.0.fc1'}
    assert {p.owner for p in plan.products} == {'blocks.0.attn'}
    reasons = {row.name: row.reason for row in plan.floating}
    assert reasons['head'] == reasons['patch_embed'] == 'outside targets'
    assert reasons['blocks.0.fc2'] == reasons['blocks.1.fc1'] == 'named in skip'


@pytest.mark.parametrize('setting', ['targets', 'skip'])
def test_a_pattern_that_matches_nothing(toy_vit: Callable[..., nn.Module], images: Tensor, setting: str) -> None:
    with pytest.raises(TargetError, match=r"'blokcs' matches nothing.*blocks"):
        gplq.prepare(toy_vit(), gplq.Recipe.gplq(4, 4, **{setting: 'blokcs'}), images[:2])


def test_skipping_everything(toy_vit: Callable[..., nn.Module], images: Tensor) -> None:
    with pytest.raises(TargetError, match='leaves nothing'):
        gplq.prepare(toy_vit(), gplq.Recipe.gplq(4, 4, skip='*'), images[:2])


def test_a_model_without_layers() -> None:
    with pytest.raises(TargetError, match='no Linear'):
        gplq.prepare(nn.Sequential(nn.ReLU()), 'w4a4', torch.ones(1))


def test_twice(toy_vit: Callable[..., nn.Module], images: Tensor) -> None:
    model = toy_vit()
    gplq.prepare(model, 'w4a4', images[:2])
    with pytest.raises(StageError, match='already'):
        gplq.prepare(model, 'w4a4', images[:2])


@pytest.mark.parametrize('example', [None, torch.empty(0, 3, 16, 16), torch.full((1, 3, 16, 16), float('nan'))])
def test_examples_of_no_use(toy_vit: Callable[..., nn.Module], example: Tensor | None) -> None:
    with pytest.raises(CalibrationError, match='example'):
        gplq.prepare(toy_vit(), 'w4a4', example)


def test_a_broken_checkpoint(toy_vit: Callable[..., nn.Module], images: Tensor) -> None:
    model = toy_vit()
    with torch.no_grad():
        model.get_submodule('head').weight.fill_(float('nan'))  # type: ignore[union-attr, operator]
    with pytest.raises(CalibrationError, match='not finite'):
        gplq.prepare(model, 'w4a4', images[:2])


def test_a_refusal_leaves_a_model_that_can_be_prepared(toy_vit: Callable[..., nn.Module], images: Tensor) -> None:
    model = toy_vit()
    with pytest.raises(GPLQError):
        gplq.prepare(model, gplq.Recipe.gplq(4, 4, targets='nothing'), images[:2])
    gplq.prepare(model, 'w4a4', images[:2])


@pytest.mark.parametrize('recipe', ['w9a4', 'w4a1', 'four bits'])
def test_bits_that_do_not_exist(toy_vit: Callable[..., nn.Module], images: Tensor, recipe: str) -> None:
    with pytest.raises(RecipeError):
        gplq.prepare(toy_vit(), recipe, images[:2])


def test_float_recipe_leaves_the_model_as_it_is(toy_vit: Callable[..., nn.Module], images: Tensor) -> None:
    model = toy_vit()
    with torch.no_grad():
        expected = model(images)
    plan = gplq.prepare(model, 'w32a32')
    gplq.calibrate(model, [images])
    gplq.quantize_weights(model, [images])
    assert plan.maps == ()
    with torch.no_grad():
        assert torch.equal(model(images), expected)


class Branches(nn.Module):
    """A layer that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(4, 4)
        self.unused = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.used(x)
        return y


def test_a_layer_that_never_ran_is_named() -> None:
    with pytest.raises(TargetError, match='unused'):
        gplq.prepare(Branches(), 'w4a4', torch.randn(2, 4))
    assert len(gplq.prepare(Branches(), gplq.Recipe.gplq(4, 4, skip='unused'), torch.randn(2, 4)).maps) == 1


class KernelAttention(nn.Module):
    """Its products are hidden in one call, as in a custom kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.proj = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        with torch._C.DisableTorchFunction():
            y = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        out: Tensor = self.proj(y)
        return out


def test_an_attention_whose_products_are_hidden_is_refused() -> None:
    model = nn.Sequential(KernelAttention())
    with pytest.raises(ProductError, match=r"0: no product .*KernelAttention.*skip=\('0',\)"):
        gplq.prepare(model, 'w4a4', torch.randn(2, 4, 8))


class HalfHidden(nn.Module):
    """The query-key product is hidden, what follows is not."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        with torch._C.DisableTorchFunction():
            scores = q @ k.transpose(-2, -1)
        return scores.softmax(-1) @ v


def test_a_softmax_without_its_query_key_product_is_refused() -> None:
    with pytest.raises(ProductError, match='query-key'):
        gplq.prepare(nn.Sequential(HalfHidden()), 'w4a4', torch.randn(2, 4, 8))


class Tied(nn.Module):
    """Two layers of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.third = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.third(self.second(self.first(x)))
        return y


def test_tied_weights_stay_in_floating_point() -> None:
    plan = gplq.prepare(Tied(), 'w4a4', torch.randn(2, 3, 4))
    assert [m.name for m in plan.maps] == ['third']
    assert all('shared' in row.reason for row in plan.floating if row.what == 'Linear')


class Standardized(nn.Conv2d):
    """Convolution by a weight that is computed on the fly."""

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(input, self.weight - self.weight.mean(), self.bias)


class Renamed(nn.Linear):
    """Another name, the same function."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight, self.bias)


def test_classes_of_their_own() -> None:
    model = nn.Sequential(Standardized(3, 4, 2), nn.Flatten(), Renamed(36, 4), nn.ReLU(), nn.Linear(4, 4))
    plan = gplq.prepare(model, 'w4a4', torch.randn(2, 3, 4, 4))
    assert [m.name for m in plan.maps] == ['2', '4']
    assert {r.name: r.reason for r in plan.floating if r.multiplications}.keys() == {'0'}


def test_a_parametrized_weight_stays_in_floating_point() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.ReLU(), nn.Linear(4, 4))
    plan = gplq.prepare(model, 'w4a4', torch.randn(2, 3, 4))
    assert [m.name for m in plan.maps] == ['2']


class Functional(nn.Module):
    """Calls ``F.linear`` on its child's weight with a bias of its own, as BEiT does."""

    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Linear(4, 4, bias=False)
        self.shift = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.child.weight, self.shift * 2)


def test_a_weight_used_by_the_parent_is_quantized() -> None:
    model = nn.Sequential(Functional(), nn.Linear(4, 4))
    x = torch.randn(16, 4)
    plan = gplq.prepare(model, gplq.Recipe.gplq(2, 2, first_last_bits=2), x)
    assert plan.owners[0].functional_linears == ('child',)
    with torch.no_grad():
        expected = model[0](x)
        gplq.calibrate(model, [x])
        assert not torch.allclose(model[0](x), expected)
        gplq.quantize_weights(model, [x])
        assert model[0].child.weight.mul(1).unique().numel() <= 16


class OtherProducts(nn.Module):
    """An attention whose products are taken in a way that no one watches."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        if self.way == 'baddbmm':
            empty = x.new_zeros(1, 1, 1)
            scores = torch.baddbmm(empty, q, k.transpose(-2, -1))
            return torch.baddbmm(empty, scores.softmax(-1), v)
        scores = (q[:, :, None] * k[:, None]).sum(-1)
        return (scores.softmax(-1)[..., None] * v[:, None]).sum(2)


@pytest.mark.parametrize('way', ['baddbmm', 'sum'])
def test_an_attention_by_other_operations_is_refused(way: str) -> None:
    with pytest.raises(ProductError, match=r'OtherProducts|the model|skip'):
        gplq.prepare(OtherProducts(way), 'w4a4', torch.randn(2, 5, 8))


class MergedHeads(nn.Module):
    """Heads and images in one axis, one inside the other or the other way round."""

    num_heads = 2

    def __init__(self, inside: str) -> None:
        super().__init__()
        self.inside = inside
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 2, 4).permute(2, 0, 3, 1, 4)
        if self.inside == 'images':
            q, k, v = (y.transpose(0, 1) for y in (q, k, v))
        q, k, v = (y.reshape(b * 2, n, 4) for y in (q, k, v))
        y = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        shape, order = ((b, 2, n, 4), (0, 2, 1, 3)) if self.inside == 'heads' else ((2, b, n, 4), (1, 2, 0, 3))
        return self.proj(y.reshape(shape).permute(order).reshape(b, n, 8))


@pytest.mark.parametrize('batch', [1, 3])
@pytest.mark.parametrize(('inside', 'merged'), [('heads', 2), ('images', 0)])
def test_merged_heads_have_scales_of_their_own_only_where_they_lie_inside(inside: str, merged: int, batch: int) -> None:
    torch.manual_seed(0)
    model = MergedHeads(inside).eval()
    images = torch.randn(4, 5, 8)
    plan = gplq.prepare(model, 'w8a4', images[:batch])
    assert {p.left.merged_heads for p in plan.products} == {merged}
    gplq.calibrate(model, [images])
    with torch.no_grad():
        alone = torch.cat([model(image[None]) for image in images])
        assert torch.allclose(model(images), alone, atol=1e-5), 'an image must not depend on its batch'


def test_an_encoder_layer_of_torch_is_quantized_in_inference() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0, activation='gelu')
    model = nn.TransformerEncoder(layer, 2).eval()
    tokens = torch.randn(4, 5, 8)
    with torch.no_grad():
        expected = model(tokens)
        gplq.prepare(model, 'w8a8', tokens)
        assert torch.allclose(model(tokens), expected, atol=1e-5)
        gplq.calibrate(model, [tokens])
        gplq.quantize_weights(model, [tokens])
        error = float((model(tokens) - expected).norm() / expected.norm())
    assert 0 < error < 0.05


class OneKey(nn.Module):
    """Multi-query attention: all heads share a key and a value."""

    num_heads = 2

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.q(x).reshape(b, n, 2, 4).transpose(1, 2)
        k, v = self.kv(x)[:, None].chunk(2, -1)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, 8)


def test_heads_that_share_a_key() -> None:
    torch.manual_seed(0)
    model = OneKey()
    tokens = torch.randn(4, 5, 8)
    expected = model(tokens)
    gplq.prepare(model, 'w8a8', tokens)
    gplq.calibrate(model, [tokens])
    found = model(tokens)
    assert float((found - expected).norm() / expected.norm()) < 0.05
    found.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


class OnMaps(nn.Module):
    """A block of tokens, or one that takes a feature map and turns it around inside."""

    def __init__(self, tokens: bool) -> None:
        super().__init__()
        self.tokens = tokens
        self.qkv = nn.Linear(4, 12)

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.tokens else x.flatten(2).transpose(1, 2)
        y = F.scaled_dot_product_attention(*self.qkv(y).chunk(3, -1))
        return y if self.tokens else y.transpose(1, 2).reshape(x.shape)


def test_blocks_have_their_channels_last() -> None:
    tokens, maps = torch.randn(2, 6, 4), torch.randn(2, 4, 3, 4)
    plan = gplq.prepare(nn.Sequential(OnMaps(True), OnMaps(True)), 'w4a4', tokens)
    assert plan.blocks == ('0', '1')
    assert gplq.prepare(nn.Sequential(OnMaps(False)), 'w4a4', maps).blocks == ()
    with pytest.raises(RecipeError, match=r"such as 0, run on feature maps .* use 'ridge' or 'affine'"):
        gplq.prepare(nn.Sequential(OnMaps(False)), gplq.Recipe.paper(4, 4), maps)


@pytest.mark.parametrize(('bits', 'first_last', 'expected'), [(4, 8, 8), (8, 4, 8), (32, 8, 32), (3, 3, 3)])
def test_first_and_last_layer_have_the_larger_bits(
    toy_vit: Callable[..., nn.Module], images: Tensor, bits: int, first_last: int, expected: int
) -> None:
    plan = gplq.prepare(toy_vit(depth=1), gplq.Recipe.gplq(bits, 4, first_last_bits=first_last), images[:2])
    weights = {a_map.name: a_map.weight_bits for a_map in plan.maps}
    assert (weights['patch_embed'], weights['head'], weights['blocks.0.fc1']) == (expected, expected, bits)
    inputs = {a_map.name: a_map.input.spec.bits for a_map in plan.maps if a_map.input is not None}
    larger = max(4, first_last)
    assert (inputs['patch_embed'], inputs['head'], inputs['blocks.0.fc1']) == (larger, larger, 4)


def test_half_precision_adds_up_in_another_order(toy_vit: Callable[..., nn.Module], images: Tensor) -> None:
    model = toy_vit(fused=True).bfloat16()
    assert gplq.prepare(model, 'w8a8', images[:2].bfloat16()).products


class SquareAttention(nn.Module):
    """As many tokens as channels in a head; over tokens, or over channels as XCiT's."""

    def __init__(self, over: str) -> None:
        super().__init__()
        self.over = over
        self.num_heads = 2
        self.qkv = nn.Linear(8, 24)
        self.proj = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).reshape(len(x), 4, 3, 2, 4)
        q, k, v = qkv.permute(2, 0, 3, 1, 4) if self.over == 'tokens' else qkv.permute(2, 0, 3, 4, 1)
        y = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        y = y.transpose(1, 2) if self.over == 'tokens' else y.permute(0, 3, 1, 2)
        return self.proj(y.reshape(len(x), 4, 8))


@pytest.mark.parametrize(('over', 'granularity'), [('tokens', 'channel'), ('channels', 'head')])
def test_columns_of_values_where_sizes_cannot_tell_tokens_from_channels(over: str, granularity: str) -> None:
    model = nn.Sequential(SquareAttention(over))
    gplq.prepare(model, gplq.Recipe.gplq(), example_inputs=torch.randn(2, 4, 8))
    (value,) = (site for site in gplq.summary(model).sites if site.site == 'value')
    assert value.granularity == granularity


class Multiplying(nn.Module):
    """Multiplies in every way that is no Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.head = nn.ConvTranspose2d(8, 8, 2)
        self.bilinear = nn.Bilinear(8, 8, 2)
        self.table = nn.Parameter(torch.ones(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        torch.addmm(y.new_zeros(4), y.flatten(0, 1), self.table)
        torch.einsum('bnc,cm->bnm', y, self.table)
        F.linear(y, self.table.t() * 2)
        return self.bilinear(y, y)


def test_whatever_multiplies_is_listed_and_counted() -> None:
    model = Multiplying()
    plan = gplq.prepare(model, gplq.Recipe(targets=('fc',)), torch.randn(2, 3, 8))
    rows = {(row.name, row.what): (row.multiplications, row.reason) for row in plan.floating}
    by_parameter = 'one operand is a parameter of no layer'
    assert rows == {
        ('', 'F.linear'): (2 * 3 * 8 * 4, 'its weight is computed, or a parameter of no layer'),
        ('', 'addmm'): (2 * 3 * 8 * 4, by_parameter),
        ('', 'einsum'): (2 * 3 * 8 * 4, by_parameter),
        ('bilinear', 'bilinear'): (2 * 3 * 8 * 8 * 2, by_parameter),
        ('head', 'ConvTranspose2d'): (
            0,
            'outside targets; it did not run in the example, so its multiplications are not counted',
        ),
    }
    text = str(gplq.summary(model))
    assert 'the model (addmm)' in text
    share = 2 * 3 * 8 * 8 / sum(count for count, _ in [*rows.values(), (2 * 3 * 8 * 8, '')])
    assert f'both operands quantized: {share:.1%} of those in the example, which 1 layers took no part in' in text


class Aggregating(nn.Module):
    """Values weighted by a softmax one by one, as MobileViTv2 and deformable attention do it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 17)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).split([1, 8, 8], dim=-1)
        context = (key * query.softmax(1)).sum(1, keepdim=True)
        return value * context


def test_values_weighted_one_by_one_are_listed() -> None:
    plan = gplq.prepare(Aggregating(), gplq.Recipe.gplq(4, 4), torch.randn(2, 3, 8))
    (row,) = [row for row in plan.floating if row.what == 'mul']
    assert (row.name, row.multiplications) == ('', 2 * 3 * 8)
    assert row.reason == 'weights values by a softmax one by one, not as a matrix product'
