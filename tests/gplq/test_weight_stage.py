"""The weight stage leaves nothing that an optimizer could move off its grid."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import gplq
from gplq.record import named_quantizers, weight_views


def test_quantizers_and_rounded_weights_are_frozen(quantized: Callable[..., nn.Module], images: Tensor) -> None:
    recipe = gplq.Recipe.gplq(exponents=(0.5,), clips=(1.0,), gelu_output='unsigned_offset', skip=('blocks.0.fc1',))
    model = quantized(recipe, depth=1)
    assert any(q.offset is not None for _, q in named_quantizers(model))
    assert not any(p.requires_grad for _, q in named_quantizers(model) for p in q.parameters())
    assert not any(getattr(view.owner, view.parameter).requires_grad for _, view in weight_views(model))
    # What is in floating point may still be trained.
    free = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {'blocks.0.fc1.weight', 'blocks.0.fc1.bias', 'head.bias', 'norm.weight'} <= free
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(images).square().mean().backward()
    optimizer.step()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved and moved <= free
