"""A LayerNorm in front of a quantized layer can divide by its input scales."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gplq
from gplq.layernorm_folding import fold_into_layernorms
from gplq.record import record_of, weight_views


class Block(nn.Module):
    """A norm that one layer reads, one that two read, and one that leaves the model."""

    def __init__(self) -> None:
        super().__init__()
        self.alone, self.two, self.last = nn.LayerNorm(6), nn.LayerNorm(6), nn.LayerNorm(6)
        for norm in (self.alone, self.two, self.last):
            nn.init.normal_(norm.bias)
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        x = x + self.a(self.alone(x).reshape(-1, 6)).reshape(x.shape)
        shared = self.two(x)
        return self.last(x + self.b(shared) + self.c(shared))


@pytest.fixture
def inputs():
    return torch.randn(16, 4, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 2, 4, 8, 16, 32])


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Block().eval()


def test_finds_the_norm_that_one_layer_alone_reads(model, inputs):
    plan = gplq.prepare(model, 'w8a8', inputs[:1])
    assert plan.norms == (('alone', 'a'),)


def test_folding_keeps_the_function_and_the_codes(model, inputs):
    recipe = gplq.Recipe.gplq(4, 4, fold_layernorm=False, exponents=(1.0,))
    gplq.prepare(model, recipe, inputs[:1])
    gplq.calibrate(model, [inputs])
    gplq.quantize_weights(model, [inputs])
    view = next(v for _, v in weight_views(model) if v.name == 'a')
    before, scale = model(inputs), view.map.input.scale.detach().clone()
    codes = view.map.weight.codes(view.matrix(), scale)
    weight = model.alone.weight.detach().clone()

    assert fold_into_layernorms(model) == 1
    assert torch.allclose(model.alone.weight, weight / scale)
    assert torch.equal(view.map.input.scale, torch.ones(6))
    assert torch.equal(view.map.weight.codes(view.matrix(), torch.ones(6)), codes)
    assert torch.allclose(model(inputs), before, atol=1e-4)


def test_the_weight_stage_folds_when_told(model, inputs):
    gplq.prepare(model, gplq.Recipe.gplq(4, 4), inputs[:1])
    gplq.calibrate(model, [inputs])
    gplq.quantize_weights(model, [inputs])
    assert torch.equal(model.a.quantization.input.scale, torch.ones(6))
    assert not torch.equal(model.b.quantization.input.scale, torch.ones(6))
    assert record_of(model).plan.recipe.fold_layernorm


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm, self.head = nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.norm(self.fc(x).mean(1)))


def test_a_classifiers_norm_stays_since_others_read_its_features(inputs):
    assert gplq.prepare(Pooled(), 'w8a8', inputs[:1]).norms == ()


class Moved(nn.Module):
    """A norm whose output one layer reads after an operation."""

    def __init__(self, move):
        super().__init__()
        self.norm, self.layer, self.move = nn.LayerNorm(6), nn.Linear(6, 6), move

    def forward(self, x):
        return x + self.layer(self.move(self.norm(x)))[:, : x.shape[1]]


@pytest.mark.parametrize(
    ('move', 'followed'),
    [
        (lambda y: torch.roll(y, 1, 1), True),
        (lambda y: torch.roll(y, (1, 2), dims=(0, 1)), True),
        (lambda y: torch.roll(y, 1, -1), False),
        (lambda y: torch.roll(y, 1, dims=2), False),
        (lambda y: torch.roll(y, (1, 1), (1, 2)), False),
        (lambda y: torch.roll(y, 1), False),
        (lambda y: F.pad(y, (0, 0, 1, 1)), True),
        (lambda y: F.pad(y, (2, -2)), False),
        (lambda y: F.pad(y, (0, 0, 1, 1), value=1.0), False),
        (lambda y: F.pad(y, (0, 0, 1, 1), 'constant', 1.0), False),
    ],
)
def test_a_channel_that_lies_in_anothers_place_is_no_longer_the_norms(move, followed, inputs):
    torch.manual_seed(0)
    plan = gplq.prepare(Moved(move).eval(), 'w8a8', inputs[:2])
    assert plan.norms == ((('norm', 'layer'),) if followed else ())
