"""Copies of models whose forward methods were replaced."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn

from gplq.independent_copy import independent_copy


def checkpointed(layer: nn.Linear) -> None:
    forward = layer.forward

    @functools.wraps(forward)
    def run(*args: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(forward, *args, use_reentrant=False)

    layer.forward = run  # type: ignore[method-assign]


def doubled(self: nn.Linear, x: Tensor) -> Tensor:
    return 2 * nn.Linear.forward(self, x)


def bound(layer: nn.Linear) -> None:
    layer.forward = doubled.__get__(layer)  # type: ignore[method-assign]


def partial(layer: nn.Linear) -> None:
    layer.forward = functools.partial(doubled, layer)  # type: ignore[method-assign]


@pytest.mark.parametrize('replace', [checkpointed, bound, partial])
def test_a_copy_runs_its_own_weights(replace: object) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    replace(model[0])  # type: ignore[operator]
    x = torch.randn(2, 4)
    before = model(x)
    twin = independent_copy(model)
    torch.testing.assert_close(twin(x), before)
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.zero_()
    torch.testing.assert_close(twin(x), before)
    assert not model(x).any()
