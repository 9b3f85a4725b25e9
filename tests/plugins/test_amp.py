from __future__ import annotations

import torch
from torch import nn

from gplq.plugins.amp import BFloat16OptimWrapper


def test_forward_runs_in_bfloat16_and_parameters_stay_float32() -> None:
    model = nn.Linear(2, 1, bias=False)
    nn.init.constant_(model.weight, 1.0)
    wrapper = BFloat16OptimWrapper(optimizer=torch.optim.SGD(model.parameters(), lr=0.5))
    with wrapper.optim_context(model):
        out = model(torch.tensor([[1.0, 3.0]]))
    assert out.dtype == torch.bfloat16
    wrapper.update_params(out.float().sum())
    assert model.weight.dtype == torch.float32
    assert model.weight.tolist() == [[0.5, -0.5]]
    assert not torch.is_autocast_enabled('cpu')
