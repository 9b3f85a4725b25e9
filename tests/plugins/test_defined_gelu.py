"""GELUs by their definition, against ONNX Runtime's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from gplq.plugins.defined_gelu import DefinedGELU


def test_the_definition() -> None:
    x = torch.linspace(-4, 4, 1001)
    with DefinedGELU():
        found, by_tanh = torch.nn.GELU()(x), F.gelu(x, approximate='tanh')
    assert torch.equal(found, x * 0.5 * (1 + torch.erf(x * 0.5**0.5)))
    assert torch.allclose(found, F.gelu(x), atol=1e-6)
    assert torch.equal(by_tanh, F.gelu(x, approximate='tanh'))


def test_onnxruntime_computes_it(tmp_path: Path) -> None:
    pytest.importorskip('onnxruntime')
    onnx = pytest.importorskip('onnx')
    from gplq.plugins.engines import open_onnxruntime

    helper, path = onnx.helper, tmp_path / 'gelu.onnx'
    ends = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ['n']) for name in 'xy']
    graph = helper.make_graph([helper.make_node('Gelu', ['x'], ['y'])], 'gelu', ends[:1], ends[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid('', 20)], ir_version=9), path)
    x = 2 * torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    engine = open_onnxruntime(path)
    found = torch.from_numpy(engine.run(x.numpy())[0])
    with engine.reference():
        defined = F.gelu(x)
    # Its distance to oneDNN's is 6e-8.
    assert float((found - defined).abs().mean()) < 2e-8
