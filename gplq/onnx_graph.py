"""A module as an ONNX graph."""

from __future__ import annotations

import inspect
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gplq.errors import TargetError

if TYPE_CHECKING:
    import onnx

__all__ = ['onnx_graph']

# The first opset with 4-bit integers, which both ONNX Runtime and OpenVINO read.
OPSET = 21


def onnx_graph(module: nn.Module, inputs: tuple[Tensor, ...], fixed_batch: bool = False) -> onnx.ModelProto:
    """A module as torch traces it.

    Args:
        module: in the mode that it is to run in.
        inputs: what it takes, at least two samples unless ``fixed_batch``.
        fixed_batch: for this number of samples alone.

    Raises:
        TargetError: if the module cannot be traced.
    """
    shapes = None if fixed_batch else _any_batch(module, inputs)
    try:
        # Its warnings are of its own future.
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter('ignore')
            program = torch.onnx.export(
                module,
                inputs,
                dynamo=True,
                dynamic_shapes=shapes,
                opset_version=OPSET,
                verbose=False,
                input_names=['input'] if len(inputs) == 1 else [f'input_{number}' for number in range(len(inputs))],
            )
    except torch.onnx.OnnxExporterError as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        remedy = '' if fixed_batch else '; try fixed_batch=True'
        raise TargetError(f'torch.onnx cannot export {type(module).__name__} ({reason:.200}){remedy}') from error
    assert program is not None
    graph: onnx.ModelProto = program.model_proto
    # Lines of source code and the paths of this machine.
    for item in (graph.graph, *graph.graph.node, *graph.graph.initializer, *graph.graph.value_info):
        del item.metadata_props[:]
    return graph


def _any_batch(module: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, Any]:
    """What torch.export is told of batches of any size: an axis for each input, those of ``*args`` together."""
    any_size = {0: torch.export.Dim.DYNAMIC}
    taken = inspect.signature(module.forward).bind(*inputs).arguments
    return {name: tuple(any_size for _ in x) if isinstance(x, tuple) else any_size for name, x in taken.items()}
