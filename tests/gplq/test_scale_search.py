"""Scales that are chosen by the error of the layer's output: against brute force, and what the gradients say."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gplq
from gplq import scale_search
from gplq.errors import CalibrationError, RecipeError, StageError
from gplq.objectives import fisher, perturbed_kl, quantized_kl
from gplq.output_error import OutputError
from gplq.record import floating_point, named_products, named_quantizers, weight_views
from gplq.sample_store import SampleStore
from gplq.scale_search import ScaleSearch, search_scales
from gplq.site_samples import SiteSamples, collect_samples

Make = Callable[..., nn.Module]
SMALL = ScaleSearch(candidates=20, rounds=2, images=8)


def calibrated(toy_vit: Make, images: Tensor, bits: int = 4, **settings) -> nn.Module:
    model = toy_vit()
    gplq.prepare(model, gplq.Recipe.ptq4vit(bits, bits, **settings), images[:2])
    gplq.calibrate(model, [images])
    return model


class OneLayer(nn.Module):
    """A classifier of one Linear behind another that is not searched over."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(torch.tanh(self.fc(x)))
        return y


@pytest.mark.parametrize('metric', ['mse', 'hessian', 'cosine'])
def test_a_layers_scales_are_those_of_brute_force(metric: str) -> None:
    torch.manual_seed(0)
    model, x = OneLayer().eval(), torch.randn(40, 6) * torch.tensor([1.0, 1, 1, 5, 1, 1])
    slopes = torch.randn(40, 4) * torch.tensor([10.0, 1, 1, 1])
    target = model.fc(x).detach()
    reference = copy.deepcopy(model.fc)
    gplq.prepare(model, gplq.Recipe.ptq4vit(3, 3, first_last_bits=3, targets=('fc',)), x)
    gplq.calibrate(model, [x])
    search = ScaleSearch(metric=metric, rounds=1, candidates=15, smallest=0.36, images=40, vectors=40)  # type: ignore[arg-type]

    def loss(m: nn.Module, batch: Tensor) -> Tensor:
        # Its slope at the output of `fc` is `slopes`.
        seen = []
        handle = m.fc.register_forward_hook(lambda module, args, y: seen.append(y))
        m(batch)
        handle.remove()
        return (seen[0] * slopes).sum()

    start = float(next(q for _, q in named_quantizers(model)).scale)
    search_scales(model, [x], search=search, loss=loss)

    # The same choice, one candidate after the other, in plain arithmetic.
    weight, ratios = reference.weight.detach(), [0.36 + i * 0.06 for i in range(15)]

    def rounded(v: Tensor, s: Tensor | float) -> Tensor:
        return (v / s).round().clamp(-4, 3) * s

    def errors(y: Tensor) -> Tensor:
        if metric == 'cosine':
            return 1 - F.cosine_similarity(y, target - reference.bias.detach(), dim=0)
        weights = slopes.square() if metric == 'hessian' else 1.0
        return ((y + reference.bias.detach() - target).square() * weights).sum(dim=0)

    inputs = rounded(x, start)
    scales = []
    for row in range(4):
        options = [weight[row].abs().max() / 3.5 * ratio for ratio in ratios]
        scales.append(min(options, key=lambda s: float(errors(inputs @ rounded(weight, s).t())[row])))
    ((_, view),) = weight_views(model)
    # Codes are those of the folded weight, which has the input's scale in it.
    chosen = (view.map.weight.scale / view.map.input.scale).detach()
    if metric == 'cosine':
        # Scales that give the same codes have the same angle: any of them will do.
        least = torch.stack([errors(inputs @ rounded(weight, s).t())[row] for row, s in enumerate(scales)])
        assert torch.allclose(errors(inputs @ rounded(weight, chosen[:, None]).t()), least, atol=1e-6)
        scales = list(chosen)
    found = rounded(weight, torch.stack(scales)[:, None])

    def overall(scale: Tensor) -> float:
        y = rounded(x, scale) @ found.t()
        if metric == 'cosine':
            return float(1 - F.cosine_similarity(y.flatten(), (target - reference.bias.detach()).flatten(), dim=0))
        return float(errors(y).sum())

    span = max(float(x.max()) / 3.5, float(-x.min()) / 4.5)
    best = min((torch.tensor(span * ratio) for ratio in ratios), key=overall)
    assert torch.allclose(chosen, torch.stack(scales))
    assert float(view.map.input.scale) == pytest.approx(float(best), rel=1e-5)
    gplq.quantize_weights(model, [x])
    assert torch.allclose(model.fc.weight, found, atol=1e-6)


def output_errors(model: nn.Module, images: Tensor) -> dict[str, float]:
    """Squared error of each product with its operands quantized, all others in floating point."""
    seen: dict[str, tuple[Tensor, ...]] = {}
    products = dict(named_products(model))
    quantizers = [q for _, q in named_quantizers(model)]
    for quantizer in quantizers:
        quantizer.enabled = False
    for name, product in products.items():
        product.watcher = lambda *tensors, name=name: seen.__setitem__(name, tensors)
    with torch.no_grad():
        model(images)
    for product in products.values():
        product.watcher = None
    for quantizer in quantizers:
        quantizer.enabled = True
    errors = {}
    for name, product in products.items():
        left, right = product.operands
        a, b, y = seen[name]
        with torch.no_grad():
            errors[name] = float((left(a) @ right(b) - y).square().sum())
    return errors


@pytest.mark.parametrize('fused', [False, True])
def test_products_lose_less_than_as_calibrated(fused: bool, toy_vit: Make, images: Tensor) -> None:
    model = toy_vit(fused=fused)
    gplq.prepare(model, gplq.Recipe.ptq4vit(3, 3), images[:2])
    gplq.calibrate(model, [images])
    before = output_errors(model, images)
    search_scales(model, [images], search=ScaleSearch(metric='mse', images=len(images), maps=1000, rounds=2))
    after = output_errors(model, images)
    assert all(after[name] <= before[name] * 1.001 for name in before)
    assert sum(after.values()) < 0.98 * sum(before.values())


@pytest.mark.parametrize('objective', ['fisher', 'quantized_kl', 'perturbation'])
def test_each_objective_quantizes_a_model(objective: str, toy_vit: Make, images: Tensor) -> None:
    model = calibrated(toy_vit, images, 6)
    expected = toy_vit()
    before = {name: p.detach().clone() for name, p in expected.named_parameters()}
    search_scales(model, [images[:4], images[4:]], search=ScaleSearch(objective=objective, candidates=20, images=8))  # type: ignore[arg-type]
    # Weights are not touched and ask for gradients as before; nobody watches any more.
    assert all(torch.equal(dict(model.named_parameters())[name], p) for name, p in before.items())
    assert all(p.requires_grad for p in model.parameters())
    assert all(view.map.watcher is None for _, view in weight_views(model))
    gplq.quantize_weights(model, [images])
    with torch.no_grad():
        error = (model(images) - expected(images)).norm() / expected(images).norm()
    assert error < 0.2


def test_the_divergence_of_a_model_from_itself_has_no_slope_and_these_have() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 10, generator=generator, requires_grad=True)

    def slope(loss: Tensor) -> float:
        return float(torch.autograd.grad(loss, logits)[0].abs().mean())

    # What the released code of PTQ4ViT differentiates: rounding noise.
    noise = slope(quantized_kl(logits, logits))
    assert noise < 1e-7
    assert slope(fisher(logits, generator)) > 1e-2
    assert slope(perturbed_kl(logits, generator)) > 1e-3
    assert slope(quantized_kl(logits, (logits.detach() * 4).round() / 4)) > 1e-3


def test_fisher_is_the_hessian_of_the_divergence_on_average() -> None:
    # One logit pair: the Hessian's diagonal is p (1 - p).
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([[0.0, 1.0]]).repeat(20000, 1).requires_grad_()
    slopes = torch.autograd.grad(fisher(logits, generator), logits)[0]
    p = torch.tensor([0.0, 1.0]).softmax(0)
    assert torch.allclose(slopes.square().mean(0), p * (1 - p), atol=5e-3)


def test_what_does_not_fit_in_memory_lies_in_files(tmp_path) -> None:
    tensors = [torch.full((1000,), float(i)) for i in range(6)]
    with SampleStore(megabytes=0.009, folder=str(tmp_path)) as store:
        for number in range(3):
            store.add('a', *tensors[2 * number : 2 * number + 2])
        store.add('b', torch.ones(3))
        assert store.spilled == 2
        assert len(list(tmp_path.rglob('*.safetensors'))) == 2
        assert all(torch.equal(x, y) for x, y in zip(store.take('a'), tensors, strict=True))
        assert 'a' not in store
        # Its memory is free again.
        store.add('c', *tensors[:2])
        assert store.spilled == 0
    assert not list(tmp_path.iterdir())


def scales_of(model: nn.Module) -> Tensor:
    """Every scale of activations, and of weights where a search has proposed them."""
    proposed = [view.map.weight.scale for _, view in weight_views(model) if view.map.weight is not None]
    return torch.cat([t.detach().flatten() for t in ([q.scale for _, q in named_quantizers(model)] + proposed)])


def test_what_lies_in_files_and_how_much_is_done_at_once_changes_nothing(
    toy_vit: Make, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    spilled, scales = [], []
    take = SampleStore.take
    monkeypatch.setattr(SampleStore, 'take', lambda store, name: (spilled.append(store.spilled), take(store, name))[1])
    for megabytes in (0.3, 1000.0):
        spilled.clear()
        model = calibrated(toy_vit, images)
        search = ScaleSearch(candidates=10, rounds=1, images=8, memory_mb=megabytes)
        search_scales(model, [images[:4], images[4:]], search=search)
        assert (max(spilled) > 0) == (megabytes < 1)
        scales.append(scales_of(model))
    # Sums of another order have other last digits, by which one candidate may lose to its equal.
    assert float((scales[0] == scales[1]).float().mean()) > 0.97


def test_a_budget_for_next_to_nothing_keeps_one_sample_of_each_site(
    toy_vit: Make, images: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    model = calibrated(toy_vit, images, 8)
    with caplog.at_level('INFO'):
        search_scales(model, [images], search=ScaleSearch(candidates=10, images=16, memory_mb=1e-6))
    assert 'blocks.0.fc1: memory_mb leaves room for 1 of 1024 samples or rows' in caplog.text
    assert bool(scales_of(model).isfinite().all())


def test_the_search_stays_within_its_budget(tmp_path: Path) -> None:
    """Sixteen images of 512 tokens and eight heads: their maps alone would take 128 MB of each product."""
    code = """
import resource, sys, torch, gplq
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_heads = 8
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 4)
    def forward(self, x):
        q, k, v = self.qkv(x).reshape(len(x), -1, 3, 8, 4).permute(2, 0, 3, 1, 4)
        y = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.out(y.transpose(1, 2).flatten(2)).mean(1)

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

torch.manual_seed(0)
torch.set_num_threads(1)
model, images = Net().eval(), torch.randn(16, 512, 32)
gplq.prepare(model, gplq.Recipe.ptq4vit(6, 6, attention_map='uniform'), images[:1])
gplq.calibrate(model, [images[:1]])
# What a pass over one image takes, forward and backward.
model(images[:1]).sum().backward()
before = peak()
batches = list(images.split(1))
gplq.search_scales(model, batches, search=gplq.ScaleSearch(candidates=5, rounds=1, images=16, rows=512, memory_mb=16))
print(peak() - before)
"""
    # What is given back counts as given back, not as room for later.
    own = {**os.environ, 'MALLOC_MMAP_THRESHOLD_': '65536'}
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=tmp_path, env=own)
    assert run.returncode == 0, run.stderr
    # Beside the budget there are the few maps of one image that are being cut.
    assert float(run.stdout) < 16 + 4 * 8


def test_the_error_of_heads_and_columns_by_hand() -> None:
    target = torch.zeros(2, 3, 4, 5)  # batch, heads, rows, columns
    found = torch.ones(7, 2, 3, 4, 5) * torch.arange(3.0)[:, None, None]
    for shape, expected in (((3, 1, 1), [0.0, 40.0, 160.0]), ((1,), [200.0]), ((3, 1, 5), None)):
        error = OutputError('mse', 7, shape)
        error.add(found[:5].clone(), target, None)
        error.add(found[5:].clone(), target, None, first=5)
        total = error.total()
        assert total.shape == (7, *shape)
        if expected is not None:
            assert total[0].flatten().tolist() == expected
        else:
            assert total[0, :, 0].tolist() == [[0.0] * 5, [8.0] * 5, [32.0] * 5]


class Net(nn.Module):
    """Two Linears; options bend what a search might take for granted."""

    def __init__(self, *, in_place: bool = False, own_bias: bool = True, dead: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 4)
        self.act, self.own_bias = nn.ReLU(inplace=in_place), own_bias
        self.shift = nn.Parameter(3 * torch.randn(16))
        with torch.no_grad():
            self.fc1.bias.copy_(self.shift)
            if dead:
                self.norm.weight[3] = self.norm.bias[3] = 0
        if not own_bias:
            self.fc1.bias = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        # BEiT and Swin v2 put the bias together in the parent.
        x = self.fc1(x) if self.own_bias else F.linear(x, self.fc1.weight, self.shift)
        y: Tensor = self.fc2(self.act(x))
        return y


def searched(model: nn.Module, x: Tensor, search: ScaleSearch, bits: int = 8, **settings) -> float:
    """Error of the quantized model, as a share."""
    expected = model(x).detach()
    gplq.prepare(model, gplq.Recipe.ptq4vit(bits, bits, **settings), x[:2])
    gplq.calibrate(model, [x])
    search_scales(model, [x], search=search)
    gplq.quantize_weights(model, [x])
    with torch.no_grad():
        return float((model(x) - expected).norm() / expected.norm())


@pytest.mark.parametrize('metric', ['hessian', 'mse'])
def test_what_a_model_does_with_outputs_and_biases_is_no_matter(metric: str) -> None:
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    search = ScaleSearch(metric=metric, images=64)  # type: ignore[arg-type]
    plain = searched(Net().eval(), x, search)
    assert plain < 0.02
    assert searched(Net(in_place=True).eval(), x, search) == pytest.approx(plain, rel=1e-3)
    assert searched(Net(own_bias=False).eval(), x, search) == pytest.approx(plain, rel=0.2)


def test_channels_that_are_always_zero_have_no_say() -> None:
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    search = ScaleSearch(images=64)
    for settings in (dict(linear_input='channel'), dict(linear_input='channel', fold=False)):
        assert searched(Net(dead=True).eval(), x * 0.01, search, **settings) < 0.02


def test_units_that_no_sample_reaches_keep_their_range() -> None:
    """Behind a ReLU that never fires the gradient is zero for every candidate: the smallest scale would win."""
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    model = Net().eval()
    with torch.no_grad():
        model.fc1.bias[:8] = -100.0
    exact = model.fc1.weight.detach().clone()
    searched(model, x, ScaleSearch(images=64), fold_layernorm=False)
    assert float((model.fc1.weight - exact).abs().max() / exact.abs().max()) < 0.02


def test_a_search_belongs_to_the_scales_it_saw() -> None:
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    model = Net().eval()
    gplq.prepare(model, gplq.Recipe.ptq4vit(8, 8), x[:2])
    gplq.calibrate(model, [x * 0.1])
    search_scales(model, [x], search=SMALL)
    gplq.calibrate(model, [x])
    with pytest.raises(StageError, match='call gplq.search_scales first'):
        gplq.quantize_weights(model, [x])


def test_a_loader_that_shuffles_compares_each_image_with_itself(toy_vit: Make, images: Tensor) -> None:
    loaders = [
        [images[:4], images[4:8], images[8:12], images[12:]],
        torch.utils.data.DataLoader(list(images), batch_size=4, shuffle=True),
    ]
    for loader in loaders:
        seen: list[float] = []

        def watch(m: nn.Module, batch: Tensor, seen: list[float] = seen) -> Tensor:
            y: Tensor = m(batch)
            seen.append(float(batch.sum()))
            return y

        model = calibrated(toy_vit, images)
        search = ScaleSearch(candidates=10, rounds=1, images=16, objective='quantized_kl')
        search_scales(model, loader, search=search, forward=watch)
        assert seen[:4] == seen[4:8]


class Heads(nn.Module):
    """Attention whose heads lie in the batch axis, or that attends to a memory of one image."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.num_heads = kind, 2
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.memory = nn.Parameter(torch.randn(1, 6, 8))
        with torch.no_grad():
            # Heads of very different size.
            self.q.weight[:4] *= 10
            self.k.weight[4:] *= 10

    def forward(self, x: Tensor) -> Tensor:
        source = self.memory * 1.0 if self.kind == 'memory' else x
        q, k, v = self.q(x), self.k(source), self.v(source)
        if self.kind == 'merged':
            q, k, v = (t.reshape(len(x), -1, 2, 4).transpose(1, 2).reshape(-1, t.shape[1], 4) for t in (q, k, v))
        y = torch.matmul((q @ k.transpose(1, 2) / 2).softmax(-1), v)
        if self.kind == 'merged':
            y = y.reshape(len(x), 2, -1, 4).transpose(1, 2).reshape(len(x), -1, 8)
        logits: Tensor = self.out(y).mean(1)
        return logits


@pytest.mark.parametrize('kind', ['plain', 'merged', 'memory'])
def test_heads_in_the_batch_and_shared_memories_are_searched(kind: str) -> None:
    x = torch.randn(16, 5, 8, generator=torch.Generator().manual_seed(1))
    errors = []
    for scheme in ('mse', 'searched'):
        model = Heads(kind).eval()
        expected = model(x).detach()
        recipe = gplq.Recipe.ptq4vit(8, 8, attention_map='uniform', weight_scheme=scheme)
        gplq.prepare(model, recipe, x[:2])
        gplq.calibrate(model, [x])
        if scheme == 'searched':
            before = {name: q.scale.detach().clone() for name, q in named_quantizers(model)}
            # Batches of odd sizes, of which some maps are kept.
            search_scales(model, [x[:5], x[5:9], x[9:]], search=ScaleSearch(metric='mse', images=16, maps=8))
            for name, quantizer in named_quantizers(model):
                change = quantizer.scale / before[name]
                assert bool((change < 3).all() and (change > 0.3).all()), name
        gplq.quantize_weights(model, [x])
        with torch.no_grad():
            errors.append(float((model(x) - expected).norm() / expected.norm()))
    assert errors[1] < 1.05 * errors[0]


def test_budgets_bound_what_one_large_batch_leaves(toy_vit: Make, images: Tensor) -> None:
    model = calibrated(toy_vit, images)

    def collect(store: SampleStore, site_mb: float, rows: int) -> SiteSamples:
        return collect_samples(
            model,
            [images],
            None,
            lambda m, batch: m(batch),
            store,
            images=4,
            vectors=10,
            maps=3,
            rows=rows,
            site_mb=site_mb,
            products=True,
            progress=lambda items, name: items,
        )

    name = next(iter(dict(named_products(model))))
    with SampleStore(100.0) as store, floating_point(model):
        samples = collect(store, 100.0, rows=5)
        ((x, slope),) = samples.take('blocks.0.fc1')
        assert (x.shape, slope.shape) == ((10, 16), (10, 32))
        # Rows of queries are sampled, keys are all there.
        ((left, right, y, slope),) = samples.take(name)
        assert (left.shape[:3], right.shape[:3], y.shape, slope.shape) == ((3, 2, 5), (3, 2, 8), (3, 2, 5, 16), y.shape)
        assert torch.allclose(left @ right, y, atol=1e-5)
    with SampleStore(100.0) as store:
        # A vector of this layer and its slope are 48 numbers.
        samples = collect(store, 3 * 48 * 4 / 2**20, rows=5)
        assert [len(t) for t in samples.take('blocks.0.fc1')[0]] == [3, 3]
        # Not even a map's rows fit.
        assert [t.shape for t in samples.take(name)[0][:3]] == [(1, 2, 1, 8), (1, 2, 8, 16), (1, 2, 1, 16)]


class Pooled(nn.Module):
    """Attention of the first six tokens to the others; a weight says how much each element of its output matters."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weights, self.num_heads = weights, 1
        self.query, self.key, self.value = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.query(x[:, :6]), self.key(x[:, 6:]), self.value(x[:, 6:])
        y = torch.matmul((q @ k.transpose(1, 2)).softmax(dim=-1), v)
        return (y * self.weights).sum(dim=(1, 2))


def pooled(weights: Tensor, x: Tensor) -> tuple[nn.Module, str]:
    """Calibrated, and the name of its second product."""
    torch.manual_seed(0)
    model = Pooled(weights).eval()
    gplq.prepare(model, gplq.Recipe.ptq4vit(4, 4, attention_map='uniform'), x)
    gplq.calibrate(model, [x])
    return model, list(dict(named_products(model)))[1]


def test_slopes_are_those_of_the_output_of_each_call() -> None:
    generator = torch.Generator().manual_seed(0)
    weights, x = torch.randn(6, 4, generator=generator), torch.randn(3, 12, 4, generator=generator)
    model, name = pooled(weights, x)
    with SampleStore(100.0) as store, floating_point(model):
        samples = collect_samples(
            model,
            [x[:2], x[2:]],
            lambda m, batch: m(batch).sum() * 3,
            lambda m, batch: m(batch),
            store,
            images=3,
            vectors=100,
            maps=100,
            rows=4,
            site_mb=100.0,
            products=True,
            progress=lambda items, name: items,
        )
        groups = samples.take(name)
    assert [group[0].shape for group in groups] == [(2, 4, 6), (1, 4, 6)]
    for left, right, y, slope in groups:
        assert torch.allclose(left @ right, y, atol=1e-5)
        # The loss is linear in this product: which rows were kept shows in their slopes.
        for one in slope:
            assert all(any(torch.allclose(row, 3 * other) for other in weights) for row in one)


def test_a_products_error_is_weighed_by_its_slopes() -> None:
    """Where one row of the product alone matters, the scale of the map is the one that suits that row."""
    x = torch.randn(64, 54, 4, generator=torch.Generator().manual_seed(0)) * 0.1
    # The last of the queries is strong, and so its row of the map has large values; those of the others are near 1/48.
    x[:, 5] *= 3000
    scales = []
    for row in (0, 5):
        weights = torch.zeros(6, 4)
        weights[row] = 1.0
        model, name = pooled(weights, x)
        search_scales(model, [x], search=ScaleSearch(images=64, maps=64), loss=lambda m, batch: m(batch).sum())
        scales.append(float(dict(named_products(model))[name].operands[0].scale.detach().max()))
    assert scales[0] < 0.5 * scales[1], scales


def test_trained_activations_keep_their_scales(toy_vit: Make, images: Tensor) -> None:
    model = calibrated(toy_vit, images, 3)
    batch = (images, torch.arange(16) % 5)
    gplq.train_activations(model, [batch], iterations=2)
    before = [q.scale.detach().clone() for _, q in named_quantizers(model)]
    search_scales(model, [images], search=SMALL)
    assert all(torch.equal(q.scale, old) for (_, q), old in zip(named_quantizers(model), before, strict=True))
    trained = copy.deepcopy(model)
    with torch.no_grad():
        expected = trained(images)
    gplq.quantize_weights(model, [images])
    with torch.no_grad():
        found = float((model(images) - expected).norm() / expected.norm())
    # Its weights are those of the quantized model's own outputs.
    assert found < 0.35


def test_what_cannot_be_searched(toy_vit: Make, images: Tensor) -> None:
    with pytest.raises(RecipeError, match='smallest=2'):
        ScaleSearch(smallest=2)
    with pytest.raises(RecipeError, match='rounds=0'):
        ScaleSearch(rounds=0)
    model = calibrated(toy_vit, images)
    with pytest.raises(StageError, match='blocks.0.attn.qkv: weight_scheme=.* call gplq.search_scales first'):
        gplq.quantize_weights(model, [images])
    model = calibrated(toy_vit, images)
    with pytest.raises(StageError, match='needs logits'):
        search_scales(model, [images], search=SMALL, forward=lambda m, batch: m(batch)[0])
    with pytest.raises(CalibrationError, match='the loss of a calibration batch is nan'):
        search_scales(model, [images], search=SMALL, loss=lambda m, batch: m(batch).sum() * float('nan'))
    with pytest.raises(CalibrationError, match='does not depend on what is quantized'):
        search_scales(model, [images], search=SMALL, loss=lambda m, batch: m(batch).detach().sum())


def test_rounds_end_where_a_turn_changes_nothing(
    toy_vit: Make, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What more rounds would repeat is left out, and the scales are those of all rounds."""
    choose = scale_search._choose
    found: list[tuple[int, list[Tensor]]] = []
    for repeats in (False, True):
        turns = []

        def turn(*args: Any, repeats: bool = repeats, turns: list[int] = turns, **settings: Any) -> bool:
            turns.append(1)
            return choose(*args, **settings) or repeats

        monkeypatch.setattr(scale_search, '_choose', turn)
        model = calibrated(toy_vit, images)
        search_scales(model, [images], search=ScaleSearch(rounds=12, candidates=10, images=4))
        gplq.quantize_weights(model)
        found.append((len(turns), list(model.state_dict().values())))
    (few, short), (many, whole) = found
    assert few < many
    assert all(torch.equal(*pair) for pair in zip(short, whole, strict=True))
