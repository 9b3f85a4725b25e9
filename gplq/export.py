"""Write a quantized model as ONNX whose products an inference engine can run on integers."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from gplq.errors import CalibrationError, StageError, TargetError
from gplq.exported import exported_twin
from gplq.files import check_writable, write_bytes_atomically
from gplq.native_size import blank_images, native_size
from gplq.onnx_graph import onnx_graph
from gplq.record import Stage, record_of

if TYPE_CHECKING:
    import onnx

__all__ = ['export']


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Tensor | Sequence[Tensor] | None = None,
    *,
    part: str = '',
    fixed_batch: bool = False,
) -> None:
    """Write the quantized model as one ONNX file.

    Every product of codes stands between QuantizeLinear and DequantizeLinear of step 1, its scales behind it, so that
    an engine that fuses these runs it on 8-bit integers: no engine multiplies activations of fewer bits on a CPU.
    Weights of up to 4 bits are stored as such, two a byte. The model itself stays as it is.

    Args:
        model: after :func:`gplq.quantize_weights`, or from :func:`gplq.load`.
        path: of the file.
        example_inputs: what the exported part takes, floating point, of which single precision is made; None makes
            blank images of the size that the part says it is made for. How many there are matters with ``fixed_batch``
            alone.
        part: name of the submodule to export, such as a detector's ``'backbone'``; all of it by default.
        fixed_batch: export for the number of samples in ``example_inputs`` alone, for models whose forward depends on
            it.

    Raises:
        StageError: if the weights are not quantized, or the ``onnx`` package is missing.
        TargetError: if there is no such part, a layer has no integer product, a tensor has a NaN, or the model cannot
            be traced.
        CalibrationError: if there is no example and the part knows no image size, or the part does not take it.
        WriteError: if the file cannot be written.
    """
    record_of(model, Stage.QUANTIZED)
    try:
        import onnx
        import onnxscript  # noqa: F401, torch's exporter needs it
    except ImportError as error:
        raise StageError(f"export needs the package {error.name}: pip install '.[deploy]' in GPLQ's folder") from None
    if part and part not in dict(model.named_modules()):
        raise TargetError(f'{type(model).__name__} has no part {part!r} to export')
    check_writable(path)
    twin = exported_twin(model)
    inputs = _examples(model.get_submodule(part), part or type(model).__name__, example_inputs)
    exported = twin.get_submodule(part)
    for name, tensor in exported.state_dict().items():
        # An engine would make a code of it, and of that a plausible figure.
        if tensor.is_floating_point() and bool(tensor.isnan().any()):
            raise TargetError(f'{".".join(filter(None, (part, name)))} has a NaN: train or download the model again')
    try:
        with torch.no_grad():
            exported(*inputs)
    except Exception as error:  # a model raises anything
        told = ' and '.join(str(tuple(x.shape)) for x in inputs)
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CalibrationError(
            f'{part or type(model).__name__} does not take example_inputs of {told} ({reason:.200}): give it a batch '
            'as its forward pass does'
        ) from error
    graph = onnx_graph(exported, inputs, fixed_batch)
    _pack_weights(graph)
    onnx.helper.set_model_props(graph, {'gplq_recipe': json.dumps(record_of(model).plan.recipe.to_dict())})
    onnx.checker.check_model(graph)
    write_bytes_atomically(path, graph.SerializeToString())


def _examples(module: nn.Module, name: str, given: Tensor | Sequence[Tensor] | None) -> tuple[Tensor, ...]:
    """What a module takes, in single precision; blank images where nothing is given."""
    if given is None:
        size = native_size(module)
        if size is None:
            raise CalibrationError(
                f'{name} says no image size that it is made for: export needs example_inputs, a batch of what it takes'
            )
        given = blank_images(module, 2, size)
    inputs = (given,) if isinstance(given, Tensor) else tuple(given) if isinstance(given, Sequence) else (given,)
    for x in inputs:
        if not (isinstance(x, Tensor) and x.is_floating_point() and x.numel()):
            told = f'{x.dtype}, {tuple(x.shape)}' if isinstance(x, Tensor) else type(x).__name__
            raise CalibrationError(
                f'{name}: example_inputs has to be a tensor of floating-point numbers, or one for each argument, with '
                f'a sample at least; got {told}'
            )
    if not inputs:
        raise CalibrationError(f'{name}: example_inputs is empty; give a batch of what it takes')
    return tuple(x.float() for x in inputs)


def _pack_weights(graph: onnx.ModelProto) -> None:
    """Store weight codes that fit into 4 bits as such, or would if counted from their channel's lowest.

    Engines unpack them when they load the file.
    """
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    axes = {
        node.input[0]: attribute.i
        for node in graph.graph.node
        for attribute in node.attribute
        if node.op_type == 'DequantizeLinear' and attribute.name == 'axis'
    }
    for tensor in [t for t in graph.graph.initializer if t.name in axes]:
        codes = numpy_helper.to_array(tensor)
        if not codes.size:
            continue
        signed = codes.min() >= -8 and codes.max() <= 7
        others = tuple(axis for axis in range(codes.ndim) if axis != axes[tensor.name])
        lowest = codes.min(axis=others, keepdims=True).astype(np.int32)
        counted = codes if signed else codes - lowest
        if counted.max() > 15:
            continue
        nibbles = np.append(counted.reshape(-1), np.zeros(codes.size % 2)).astype(np.int8).view(np.uint8) & 15
        packed = (nibbles[0::2] | nibbles[1::2] << 4).astype(np.uint8)
        name = f'{tensor.name}.packed'
        kind = TensorProto.INT4 if signed else TensorProto.UINT4
        added = [helper.make_tensor(name, kind, codes.shape, packed.tobytes(), raw=True)]
        if signed or not lowest.any():
            nodes = [helper.make_node('Cast', [name], [tensor.name], to=TensorProto.INT8)]
        else:
            added.append(numpy_helper.from_array(lowest, f'{tensor.name}.lowest'))
            wide, sums = f'{tensor.name}.counted', f'{tensor.name}.sums'
            nodes = [
                helper.make_node('Cast', [name], [wide], to=TensorProto.INT32),
                helper.make_node('Add', [wide, added[1].name], [sums]),
                helper.make_node('Cast', [sums], [tensor.name], to=TensorProto.INT8),
            ]
        graph.graph.initializer.extend(added)
        graph.graph.initializer.remove(tensor)
        for node in reversed(nodes):
            graph.graph.node.insert(0, node)
