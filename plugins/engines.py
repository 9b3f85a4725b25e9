"""Inference engines on the CPU: what they make of an exported file, and which of its products they run on integers."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gplq.errors import CheckpointError, StageError
from gplq.plugins.defined_gelu import DefinedGELU

__all__ = ['ENGINES', 'Engine', 'open_onnxruntime', 'open_openvino', 'openvino_computes_bfloat16', 'with_codes']

Array = NDArray[np.generic]

_BYTES = {'u8', 'i8'}


class Engine(NamedTuple):
    """An engine with a file loaded.

    Attributes:
        name: of the engine, with its version.
        run: images (N, 3, H, W) -> every output of the file.
        integer: matrix products and convolutions that its own graph runs on 8-bit integers.
        floating: those that it runs in floating point.
        reference: in which PyTorch computes a GELU as this engine does.
    """

    name: str
    run: Callable[[NDArray[np.float32]], list[Array]]
    integer: int
    floating: int
    reference: Callable[[], AbstractContextManager[Any]]


def open_onnxruntime(path: Path, threads: int = 1) -> Engine:
    """ONNX Runtime; its optimized graph is written out and read to count the products.

    Raises:
        StageError: if it is not installed.
        CheckpointError: if it cannot load the file.
    """
    onnx, onnxruntime = _require('onnx'), _require('onnxruntime')
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder, 'optimized.onnx'))
        try:
            session = onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])
        except Exception as error:  # its exceptions have no class in common
            raise CheckpointError(f'ONNX Runtime cannot load {path}: {error}') from None
        nodes = [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]
    (name,) = (value.name for value in session.get_inputs())
    integer = ('MatMulIntegerToFloat', 'MatMulInteger', 'QLinearMatMul', 'QLinearConv', 'ConvInteger')
    return Engine(
        f'ONNX Runtime {onnxruntime.__version__}',
        lambda images: list(session.run(None, {name: images})),
        sum(nodes.count(kind) for kind in integer),
        sum(
            nodes.count(kind) for kind in ('MatMul', 'FusedMatMul', 'Gemm', 'FusedGemm', 'Einsum', 'Conv', 'FusedConv')
        ),
        DefinedGELU,
    )


def open_openvino(path: Path, threads: int = 1, precision: str = 'f32') -> Engine:
    """OpenVINO; a product is on integers where its runtime graph has bytes on both sides of it.

    (The precision that it gives for a layer is that of its weights.) Products that it fuses into a kernel of its own
    are not in that graph; they have the kernel's precision.

    Args:
        path: of the file.
        threads: that it may use.
        precision: of what is not on integers, as OpenVINO calls it.

    Raises:
        StageError: if it is not installed.
        CheckpointError: if it cannot load the file.
    """
    onnx, openvino = _require('onnx'), _require('openvino')
    settings = {'INFERENCE_NUM_THREADS': threads, 'INFERENCE_PRECISION_HINT': precision}
    try:
        compiled = openvino.Core().compile_model(str(path), 'CPU', settings)
    except RuntimeError as error:
        raise CheckpointError(f'OpenVINO cannot load {path}: {error}') from None
    products, kernels = [], set()
    for operation in compiled.get_runtime_model().get_ordered_ops():
        information = operation.get_rt_info()
        if information['layerType'].value in ('FullyConnected', 'MatMul', 'Convolution'):
            products.append({side.get_element_type().get_type_name() for side in operation.inputs()[:2]} <= _BYTES)
        elif information['layerType'].value == 'Subgraph':
            kernels.add(information['runtimePrecision'].value)
    every = sum(
        node.op_type in ('MatMul', 'Gemm', 'Conv') for node in onnx.load(path, load_external_data=False).graph.node
    )
    products += (every - len(products)) * [bool(kernels) and kernels <= _BYTES]
    integer = sum(products)
    return Engine(
        f'OpenVINO {openvino.__version__.partition("-")[0]}',
        lambda images: list(compiled(images).values()),
        integer,
        len(products) - integer,
        nullcontext,
    )


def openvino_computes_bfloat16() -> bool:
    """Whether OpenVINO uses bfloat16 on this processor.

    Raises:
        StageError: if it is not installed.
    """
    return 'BF16' in _require('openvino').Core().get_property('CPU', 'OPTIMIZATION_CAPABILITIES')


ENGINES = {'onnxruntime': open_onnxruntime, 'openvino': open_openvino}


def with_codes(source: Path, target: Path) -> int:
    """Copy an exported file with the codes of every QuantizeLinear as further outputs, in their order.

    Returns:
        How many there are.
    """
    onnx = _require('onnx')
    model = onnx.load(source)
    names = [node.output[0] for node in model.graph.node if node.op_type == 'QuantizeLinear']
    for name in names:
        model.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    onnx.save(onnx.shape_inference.infer_shapes(model), target)
    return len(names)


def _require(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise StageError(f"this needs the package {error.name}: pip install '.[deploy]' in GPLQ's folder") from None
