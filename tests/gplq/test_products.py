"""Products by interception: the fused attention's parts, nested owners, copies, compiled and changing models."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointError, checkpoint

import gplq
from gplq.errors import ProductError
from gplq.fused_attention import quantized_attention
from gplq.grid import Grid
from gplq.products import product_operands, scaled_dot_product_parts
from gplq.record import named_products, named_quantizers


@pytest.mark.parametrize(
    'arguments',
    [
        {},
        {'scale': 0.3},
        {'is_causal': True},
        {'attn_mask': 'bool'},
        {'attn_mask': 'float'},
        {'attn_mask': 'float', 'scale': 1.0},
        {'dropout_p': 0.0},
    ],
    ids=str,
)
def test_parts_equal_the_fused_attention(arguments: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, n, d, generator=generator) for n, d in ((4, 8), (5, 8), (5, 6)))
    if 'attn_mask' in arguments:
        mask = torch.rand(2, 1, 4, 5, generator=generator) > 0.4
        mask[..., 0] = True
        float_mask = torch.randn(2, 3, 4, 5, generator=generator)
        arguments = {**arguments, 'attn_mask': mask if arguments['attn_mask'] == 'bool' else float_mask}
    expected = F.scaled_dot_product_attention(query, key, value, **arguments)
    found = scaled_dot_product_parts(torch.matmul, torch.matmul, query, key, value, **arguments)
    assert torch.allclose(found, expected, atol=1e-6)


def test_parts_equal_the_fused_attention_with_grouped_queries() -> None:
    query, key, value = (torch.randn(2, heads, 4, 8) for heads in (6, 2, 2))
    expected = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    found = scaled_dot_product_parts(torch.matmul, torch.matmul, query, key, value, enable_gqa=True)
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize('fused', [False, True])
def test_a_query_that_may_look_at_nothing_gets_nothing(fused: bool) -> None:
    query, key, value = (torch.randn(2, 3, 4, 8) for _ in range(3))
    mask = torch.zeros(4, 4)
    mask[1] = float('-inf')
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    if fused:
        # So fine a scale changes nothing.
        grid = Grid(torch.full((1,), 2.0**-16), -(2**20), 2**20)
        found = quantized_attention(query * 8**-0.5, key, value, mask, (grid,) * 4)
    else:
        found = scaled_dot_product_parts(torch.matmul, torch.matmul, query, key, value, attn_mask=mask)
    assert torch.allclose(found, expected, atol=1e-4)
    assert not found[:, :, 1].any()


def test_what_is_a_product() -> None:
    x, weight = torch.ones(2, 2), nn.Parameter(torch.ones(2, 2))
    y = torch.zeros(2, 2)
    for func, args, kwargs in (
        (torch.matmul, (x, y), {}),
        (torch.matmul, (x,), {'other': y}),
        (torch.matmul, (), {'input': x, 'other': y}),
        (torch.bmm, (x,), {'mat2': y}),
        (torch.mm, (x, y), {}),
        (torch.linalg.matmul, (x, y), {}),
        (Tensor.__matmul__, (x, y), {}),
        (torch.einsum, ('ij,jk->ik', x, y), {}),
        (torch.einsum, ('ij,jk->ik', [x, y]), {}),
    ):
        found = product_operands(func, args, kwargs)
        assert found is not None, func
        assert found[0] is x and found[1] is y, func
    assert product_operands(torch.matmul, (x, weight), {}) is None
    assert product_operands(torch.einsum, ('ij,jk,kl->il', x, x, x), {}) is None
    assert product_operands(torch.add, (x, x), {}) is None


class Einsum(nn.Module):
    """Both products as einsum, one of them with its operands in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        scores = torch.einsum('bnd,bmd->bnm', q, k).softmax(-1)
        return torch.einsum('bnm,bmd->bnd', [scores, v])


def test_einsum_is_quantized() -> None:
    model = nn.Sequential(Einsum(), nn.Linear(8, 8)).eval()
    x = torch.randn(4, 5, 8)
    plan = gplq.prepare(model, 'w8a2', x)
    assert [(p.left.site, p.right.site) for p in plan.products] == [('query', 'key'), ('attention_map', 'value')]
    expected = model(x)
    gplq.calibrate(model, [x])
    for name, quantizer in named_quantizers(model):
        quantizer.enabled = ':1:attention_map' in name
    assert not torch.allclose(model(x), expected)


class Outer(nn.Module):
    """An attention that runs another one inside its own forward."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        scores = (q @ k.transpose(-2, -1)).softmax(-1)
        return scores @ self.inner(v)


def test_nested_owners_count_their_own_products() -> None:
    model = Outer(Outer(nn.Linear(8, 8))).eval()
    x = torch.randn(4, 5, 8)
    with torch.no_grad():
        expected = model(x)
    plan = gplq.prepare(model, 'w8a8', x)
    assert [(p.owner, p.index) for p in plan.products] == [('', 0), ('inner', 0), ('inner', 1), ('', 1)]
    assert [(o.name, o.product_calls) for o in plan.owners] == [('', 2), ('inner', 2)]
    gplq.calibrate(model, [x])
    with torch.no_grad():
        assert float((model(x) - expected).norm() / expected.norm()) < 0.03


class Moody(nn.Module):
    """Leaves its attention out for long inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.num_heads = 1

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        if x.shape[1] > 5:
            return v
        return (q @ k.transpose(-2, -1)).softmax(-1) @ v


def test_another_count_of_products_is_an_error_that_names_the_module() -> None:
    model = nn.Sequential(Moody()).eval()
    gplq.prepare(model, 'w4a4', torch.randn(2, 4, 8))
    with pytest.raises(ProductError, match=r"0: 0 matrix products .* 2 .*skip=\('0',\)"):
        model(torch.randn(2, 7, 8))
    model(torch.randn(2, 4, 8))


def test_a_copy_uses_its_own_scales(toy_vit: Callable[..., nn.Module], images: Tensor) -> None:
    """As an average of weights is kept: the copy must not see what becomes of the original."""
    model = toy_vit()
    gplq.prepare(model, 'w4a4', images[:2])
    gplq.calibrate(model, [images])
    twin = copy.deepcopy(model)
    with torch.no_grad():
        expected = model(images)
        for _, quantizer in named_quantizers(model):
            quantizer.log_scale.add_(2.0)
        for p in model.blocks.parameters():  # type: ignore[union-attr]
            p.mul_(0.5)
        assert torch.equal(twin(images), expected)
        assert not torch.allclose(model(images), expected)
    ours, theirs = dict(named_products(model)), dict(named_products(twin))
    assert ours.keys() == theirs.keys()
    assert not any(ours[name] is theirs[name] for name in ours)


def test_pickling(toy_vit: Callable[..., nn.Module], images: Tensor) -> None:
    # The toy's class lives in a conftest, which pickle cannot import: a part made of torch's own classes does.
    model = nn.Sequential(nn.Linear(8, 8), nn.MultiheadAttention(8, 2)).eval()
    x = torch.randn(5, 2, 8)

    def run(m: nn.Module) -> Tensor:
        y = m[0](x)  # type: ignore[index]
        out: Tensor = m[1](y, y, y)[0]  # type: ignore[index]
        return out

    gplq.prepare(model, 'w4a4', forward=run)
    gplq.calibrate(model, [x], forward=lambda m, batch: run(m))
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(run(twin), run(model))
    assert isinstance(twin[1], nn.MultiheadAttention)


@pytest.mark.slow
@pytest.mark.parametrize('fused', [False, True])
def test_compiles_in_one_graph(toy_vit: Callable[..., nn.Module], images: Tensor, fused: bool) -> None:
    model = toy_vit(depth=1, fused=fused)
    gplq.prepare(model, 'w4a4', images[:2])
    gplq.calibrate(model, [images])
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    with torch.no_grad():
        assert torch.allclose(compiled(images), model(images), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('fused', [False, True])
@pytest.mark.parametrize('backend', ['aot_eager', 'inductor'])
def test_trains_compiled(toy_vit: Callable[..., nn.Module], images: Tensor, fused: bool, backend: str) -> None:
    model = toy_vit(depth=1, fused=fused)
    gplq.prepare(model, 'w4a4', images[:2])
    gplq.calibrate(model, [images])
    model.train()
    results = []
    for run in (model, torch.compile(model, fullgraph=True, backend=backend)):
        model.zero_grad()
        y = run(images)
        y.square().sum().backward()
        weights = {name: p.grad for name, p in model.named_parameters() if 'log_scale' not in name}
        results.append((y.detach(), {name: x for name, x in weights.items() if x is not None}))
    (expected, theirs), (found, mine) = results
    assert torch.allclose(found, expected, atol=1e-5)
    assert mine.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert torch.allclose(mine[name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max())), name


class Given(nn.Module):
    """An attention that computes as it is told."""

    def __init__(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        self.attend = attend

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(*self.qkv(x).chunk(3, dim=-1))


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1)).softmax(-1) @ v


def test_a_product_into_a_given_tensor_is_not_taken_for_a_result() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y = torch.zeros_like(v)
        torch.bmm((q @ k.transpose(-2, -1)).softmax(-1), v, out=y)
        return y

    with torch.no_grad(), pytest.raises(ProductError, match='name the attention module in skip'):
        gplq.prepare(nn.Sequential(Given(attend)).eval(), 'w4a4', torch.randn(4, 6, 16))


@pytest.mark.parametrize('reentrant', [True, False])
def test_checkpointing_within_a_module_is_refused(reentrant: bool) -> None:
    def attend(*operands: Tensor) -> Tensor:
        return checkpoint(softmax_attention, *operands, use_reentrant=reentrant)  # type: ignore[no-any-return]

    x = torch.randn(4, 6, 16)
    model = nn.Sequential(Given(attend), nn.Linear(16, 16))
    gplq.prepare(model, 'w4a4', x)
    gplq.calibrate(model, [x])
    model.train()
    with pytest.raises(ProductError if reentrant else CheckpointError, match='checkpoint'):
        model(x).sum().backward()


def test_threads_do_not_see_each_others_products(toy_vit: Callable[..., nn.Module], images: Tensor) -> None:
    model = toy_vit().eval()
    gplq.prepare(model, 'w4a4', images[:2])
    gplq.calibrate(model, [images])
    with torch.no_grad():
        expected = model(images[:2])

    def run(_: int) -> bool:
        with torch.no_grad():
            return torch.equal(model(images[:2]), expected)

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(run, range(100)))
