"""What an engine computes from the exported file, and on what: its own graph is read after it has optimized it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gplq
from gplq.errors import CalibrationError, StageError, TargetError, WriteError
from gplq.exported import exported_twin, outputs_and_codes
from gplq.plugins.engines import ENGINES

onnx = pytest.importorskip('onnx')
ort = pytest.importorskip('onnxruntime')
pytest.importorskip('onnxscript')


def quantized_on(model: nn.Module, x: Tensor, recipe: gplq.Recipe | str = 'w4a4') -> nn.Module:
    """A model that went through both stages but for training."""
    gplq.prepare(model, recipe, x[:2])
    gplq.calibrate(model, [x])
    gplq.quantize_weights(model, [x])
    return model


def alike(found: Tensor, expected: Tensor) -> bool:
    """But for two samples of sixteen: where a code is next to a tie, last bits decide, which depend on the machine."""
    different = (found - expected).abs().flatten(1).amax(1) > 1e-4
    return int(different.sum()) <= len(found) // 8


class Session:
    """ONNX Runtime on one thread, and the graph that it runs."""

    def __init__(self, path: Path) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        options.optimized_model_filepath = str(path.with_suffix('.optimized'))
        self.session = ort.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])
        graph = onnx.load(options.optimized_model_filepath).graph
        self.operations = Counter(node.op_type for node in graph.node)

    def __call__(self, x: Tensor) -> Tensor:
        (name,) = (value.name for value in self.session.get_inputs())
        return torch.from_numpy(self.session.run(None, {name: x.numpy()})[0])


@pytest.mark.parametrize('fused', [True, False])
@pytest.mark.parametrize('bits', [4, 8])
def test_every_product_runs_on_integers(
    quantized: Callable[..., nn.Module], images: Tensor, tmp_path: Path, bits: int, fused: bool
) -> None:
    """Patch embedding, classifier, and two blocks of four layers and two products; five images, not the two traced.

    A layer of 8 bits is two products.
    """
    model = quantized(f'w{bits}a{bits}', fused=fused)
    path = tmp_path / 'model.onnx'
    gplq.export(model, path, images[:2])
    session = Session(path)
    assert session.operations['MatMulIntegerToFloat'] == 2 * 2 + 2 * (4 * bits // 4 + 2)
    assert not {'MatMul', 'Gemm', 'Conv', 'DequantizeLinear'} & set(session.operations)
    with torch.no_grad():
        # Of the first image one 8-bit code lies at a tie, which sums of codes and sums of values round differently.
        expected, on_codes = model(images[1:6]), exported_twin(model)(images[1:6])
    found = session(images[1:6])
    assert torch.allclose(found, on_codes, atol=1e-5)
    assert torch.allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize('bits', [4, 8])
def test_sums_of_codes_are_the_same_to_the_last_bit(bits: int, tmp_path: Path) -> None:
    """PyTorch adds values as exactly as an engine adds integers, or codes at a tie would differ between them."""
    torch.manual_seed(0)
    x = torch.randn(64, 5, 48)
    layer = quantized_on(nn.Sequential(nn.Linear(48, 96)).eval(), x, f'w{bits}a{bits}')
    path = tmp_path / 'model.onnx'
    gplq.export(layer, path, x[:2])
    with torch.no_grad():
        assert torch.equal(Session(path)(x), exported_twin(layer)(x))


class Shifted(nn.Module):
    """A sum before a layer, whose constant an engine could bring together with the layer's offset."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(48))
        self.layer = nn.Linear(48, 96)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x + self.bias)
        return y


@pytest.mark.parametrize('engine', ['onnxruntime', 'openvino'])
@pytest.mark.parametrize('offset', [True, False], ids=['offset', 'signed'])
@pytest.mark.parametrize('folded', [True, False], ids=['folded', 'scaled'])
def test_values_next_to_a_tie_are_rounded_alike(engine: str, offset: bool, folded: bool, tmp_path: Path) -> None:
    pytest.importorskip(engine)
    torch.manual_seed(0)
    x = torch.randn(64, 5, 48)
    model = Shifted().eval()
    if not folded:
        # A product of a sum is the sum of products elsewhere.
        nn.init.zeros_(model.bias)
    gplq.prepare(model, gplq.Recipe.gplq(weight_bits=4, activation_bits=4, input_offset=offset), x[:2])
    gplq.calibrate(model, [x])
    if folded:
        nn.init.zeros_(model.get_submodule('layer.quantization.input').log_scale)
    gplq.quantize_weights(model, [x])
    twin = exported_twin(model)
    (site,) = (module for module in twin.modules() if hasattr(module, 'highest'))
    ties = torch.randint(0, 15, x.shape) + 0.5 + torch.randint(-4, 5, x.shape) * 2.0**-22
    x = (ties + site.lowest) * site.scale - twin.bias
    path = tmp_path / 'model.onnx'
    gplq.export(model, path, x[:2])
    with torch.no_grad():
        assert torch.equal(torch.from_numpy(ENGINES[engine](path).run(x.numpy())[0]), twin(x))


class Scores(nn.Module):
    """An attention of three heads that gives its scores, since a softmax is not the same in every engine."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(48, 144)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = self.qkv(x).unflatten(-1, (3, 3, 16)).permute(2, 0, 3, 1, 4).unbind(0)
        scores = q @ k.transpose(-2, -1)
        return scores, scores.softmax(-1) @ v


@pytest.mark.parametrize('engine', ['onnxruntime', 'openvino'])
@pytest.mark.parametrize('bits', ['w4a4', 'w8a8'])
def test_products_of_codes_are_the_same_to_the_last_bit(engine: str, bits: str, tmp_path: Path) -> None:
    """OpenVINO too sums codes and multiplies the sum; those of 8 bits, left alone, it multiplies by the scale first."""
    pytest.importorskip(engine)
    torch.manual_seed(0)
    x = torch.randn(64, 5, 48)
    model = quantized_on(Scores().eval(), x, bits)
    path = tmp_path / 'model.onnx'
    gplq.export(model, path, x[:2])
    found, _ = ENGINES[engine](path).run(x.numpy())
    with torch.no_grad():
        scores, _ = exported_twin(model)(x)
    assert torch.equal(torch.from_numpy(found), scores)


class Products(nn.Module):
    """Queries and keys, which are also the values, as they are given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k = x.unbind(1)
        scores = q @ k.transpose(-2, -1)
        return scores, self.layer(scores.softmax(-1) @ k)


@pytest.mark.parametrize('engine', ['onnxruntime', 'openvino'])
def test_operands_next_to_a_tie_are_rounded_alike(engine: str, tmp_path: Path) -> None:
    """OpenVINO adds 128 to what becomes a signed byte, which brings values next to a tie to lie at it."""
    pytest.importorskip(engine)
    torch.manual_seed(0)
    x = torch.randn(64, 2, 3, 5, 16)
    model = quantized_on(Products().eval(), x)
    twin = exported_twin(model)
    ties = torch.randint(-7, 7, x[:, 0].shape) + 0.5 + torch.randint(-4, 5, x[:, 0].shape) * 2.0**-20
    x[:, 0] = ties * twin.get_submodule('quantized_products.0.left').scale
    path = tmp_path / 'model.onnx'
    gplq.export(model, path, x[:2])
    with torch.no_grad():
        assert torch.equal(torch.from_numpy(ENGINES[engine](path).run(x.numpy())[0]), twin(x)[0])


class Merged(nn.Module):
    """Heads merged into the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 4
        self.qkv = nn.Linear(48, 96)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4).flatten(1, 2).unbind(0)
        return torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v)


@pytest.mark.parametrize('engine', ['onnxruntime', 'openvino'])
@pytest.mark.parametrize('fixed_batch', [False, True])
def test_merged_heads(engine: str, fixed_batch: bool, tmp_path: Path) -> None:
    pytest.importorskip(engine)
    torch.manual_seed(0)
    x = torch.randn(16, 12, 48)
    model = quantized_on(Merged().eval(), x)
    path = tmp_path / 'model.onnx'
    gplq.export(model, path, x, fixed_batch=fixed_batch)
    loaded = ENGINES[engine](path)
    assert (loaded.integer, loaded.floating) == (2 + 2, 0)
    with torch.no_grad():
        assert torch.allclose(torch.from_numpy(loaded.run(x.numpy())[0]), exported_twin(model)(x), atol=1e-5)


class SeparateMaps(nn.Module):
    """Queries, keys and values of three layers, which see the same input; values have a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))
        with torch.no_grad():
            self.v.bias += 3.0

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (2, 8)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return ((q @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(1, 2).flatten(2)


def separate_maps(bits: str, **settings: Any) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = SeparateMaps().eval(), torch.randn(16, 12, 16)
    return quantized_on(model, x, gplq.Recipe.gplq(int(bits[1]), int(bits[3]), **settings)), x


@pytest.mark.parametrize('instructions', ['', 'AVX2', 'DEFAULT'], ids=['onnxruntime', 'openvino-avx2', 'openvino'])
@pytest.mark.parametrize('bits', ['w8a8', 'w4a8', 'w4a7'])
def test_sums_of_eight_bit_codes_are_not_cut_off(instructions: str, bits: str, tmp_path: Path) -> None:
    """Flat attention maps times values of one sign are the largest sums; OpenVINO would add them in 16 bits."""
    model, x = separate_maps(bits)
    path = tmp_path / 'model.onnx'
    gplq.export(model, path, x[:2])
    found = in_openvino(path, x, instructions)[0] if instructions else Session(path)(x)
    with torch.no_grad():
        assert (found - exported_twin(model)(x)).abs().max() < 0.01
        assert (found - model(x)).abs().max() < 0.05


def test_sites_that_round_alike_are_one_in_the_file(tmp_path: Path) -> None:
    model, x = separate_maps('w4a4', linear_input='tensor')
    path = tmp_path / 'model.onnx'
    gplq.export(model, path, x[:2])
    nodes = [node.op_type for node in onnx.load(path).graph.node]
    (output,), codes = outputs_and_codes(exported_twin(model), x)
    # The layers' input, and two operands of each product.
    assert nodes.count('QuantizeLinear') == len(codes) == 1 + 2 * 2
    assert torch.allclose(output, Session(path)(x), atol=1e-5)


def test_a_nan_is_named(quantized: Callable[..., nn.Module], images: Tensor, tmp_path: Path) -> None:
    """An engine makes a code of it."""
    model = quantized('w4a4')
    model.get_submodule('blocks.0.norm1').weight.data[3] = float('nan')
    with pytest.raises(TargetError, match=r'blocks.0.norm1.weight has a NaN'):
        gplq.export(model, tmp_path / 'model.onnx', images[:2])


@pytest.mark.parametrize(
    'recipe',
    [
        dict(gelu_output='unsigned_offset'),
        dict(weight_scheme='percentile_asymmetric'),
        dict(linear_input='tensor'),
        dict(fold_layernorm=False),
        dict(compensation='qwt'),
        dict(compensation='ridge'),
    ],
    ids=lambda recipe: '-'.join(map(str, recipe.values())),
)
def test_recipes(quantized: Callable[..., nn.Module], images: Tensor, tmp_path: Path, recipe: dict[str, Any]) -> None:
    """Offsets, zero points and compensations are exported, and on integers too."""
    model = quantized(gplq.Recipe.gplq(weight_bits=4, activation_bits=4, **recipe))
    path = tmp_path / 'model.onnx'
    gplq.export(model, path, images[:2])
    session = Session(path)
    assert not {'MatMul', 'Gemm', 'Conv', 'DequantizeLinear'} & set(session.operations)
    with torch.no_grad():
        assert torch.allclose(session(images), exported_twin(model)(images), atol=1e-5)
        assert alike(session(images), model(images))


class Convolutions(nn.Module):
    """Overlapping windows, groups, and a stride that leaves a border out."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.down = nn.Conv2d(8, 8, 3, stride=3)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(self.depthwise(self.stem(x).relu()))
        y: Tensor = self.head(x.mean((2, 3)))
        return y


class MultiheadAttention(nn.Module):
    """Three linear maps in one parameter, called by the parent."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2)[:, :, :3]
        x = torch.cat([x, x, x[:, :, :2]], 2)
        y: Tensor = self.head(self.attention(x, x, x)[0].mean(1))
        return y


@pytest.mark.parametrize('model', [Convolutions, MultiheadAttention])
def test_other_layers(model: type[nn.Module], images: Tensor, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = quantized_on(model().eval(), images)
    path = tmp_path / 'model.onnx'
    gplq.export(network, path, images[:2])
    session = Session(path)
    # Windows that overlap stay convolutions, which ONNX Runtime runs in floating point on the values of the codes.
    assert session.operations['MatMulIntegerToFloat'] == (1 + 2 if model is Convolutions else 6 + 2)
    assert not {'MatMul', 'Gemm'} & set(session.operations)
    with torch.no_grad():
        assert torch.allclose(session(images), network(images), atol=1e-4)


def in_openvino(path: Path, x: Tensor, instructions: str) -> tuple[Tensor, int, int]:
    """The first output of OpenVINO, its products on integers and those in floating point.

    A process of its own is kept from VNNI, if need be.
    """
    pytest.importorskip('openvino')
    given, found = path.with_name('given.npy'), path.with_name('found.npy')
    np.save(given, x.numpy())
    program = (
        'import sys, numpy; from pathlib import Path; from gplq.plugins.engines import open_openvino\n'
        'engine = open_openvino(Path(sys.argv[1])); numpy.save(sys.argv[3], engine.run(numpy.load(sys.argv[2]))[0])\n'
        'print(engine.integer, engine.floating)'
    )
    done = subprocess.run(
        [sys.executable, '-c', program, path, given, found],
        env={**os.environ, 'ONEDNN_MAX_CPU_ISA': instructions},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    integer, floating = map(int, done.stdout.split()[-2:])
    return torch.from_numpy(np.load(found)), integer, floating


@pytest.mark.parametrize('instructions', ['AVX2', 'DEFAULT'])
@pytest.mark.parametrize(
    ('recipe', 'integer', 'floating'),
    [
        (gplq.Recipe.gplq(4, 4), 2 * 2 + 2 * (4 + 2), 0),
        (gplq.Recipe.gplq(4, 4, weight_scheme='percentile_asymmetric'), 2 * 2 + 2 * (4 + 2), 0),
        # Right operands of 8 bits cannot be signed bytes where there is no VNNI.
        (gplq.Recipe.gplq(8, 8), 2 * 2 + 2 * 4 * 2, 2 * 2),
    ],
    ids=['w4a4', 'zero points', 'w8a8'],
)
def test_openvino_gives_the_same(
    quantized: Callable[..., nn.Module],
    images: Tensor,
    tmp_path: Path,
    recipe: gplq.Recipe,
    integer: int,
    floating: int,
    instructions: str,
) -> None:
    """Every head with its own scale, for any batch; with its own settings, as by a user."""
    model = quantized(recipe, heads=4)
    path = tmp_path / 'model.onnx'
    gplq.export(model, path, images[:2])
    found, *products = in_openvino(path, images, instructions)
    with torch.no_grad():
        assert alike(found, model(images))
    assert products == [integer, floating]


@pytest.mark.parametrize('scheme', ['mse', 'percentile_asymmetric'])
def test_signed_codes_never_overflow_sixteen_bits(
    quantized: Callable[..., nn.Module], images: Tensor, tmp_path: Path, scheme: str
) -> None:
    """Two products of a byte up to 255 by a signed code are added in 16 bits where there is no VNNI."""
    gplq.export(quantized(gplq.Recipe.gplq(4, 4, weight_scheme=scheme)), tmp_path / 'model.onnx', images[:2])
    graph = onnx.load(tmp_path / 'model.onnx').graph
    maker = {output: node for node in graph.node for output in node.output}
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}

    def codes(name: str) -> Any:
        """Of a constant, as the engine unpacks it."""
        if name in constants:
            return constants[name].astype(int)
        assert maker[name].op_type in ('Cast', 'Add')
        return sum(codes(part) for part in maker[name].input)

    sites = [node for node in graph.node if node.op_type == 'DequantizeLinear' and node.attribute]
    assert len(sites) == 2 * 4 + 2 * 2, 'patch embedding and classifier have 8 bits'
    for site in sites:
        assert 2 * 255 * abs(codes(site.input[0])).max() <= 32767
        assert not codes(site.input[2]).any()


@pytest.mark.parametrize('scheme', ['mse', 'percentile_asymmetric'])
def test_weights_take_half_a_byte(
    quantized: Callable[..., nn.Module], images: Tensor, tmp_path: Path, scheme: str
) -> None:
    """All of both blocks; the first and the last layer have 8 bits, two halves."""
    model = quantized(gplq.Recipe.gplq(4, 4, weight_scheme=scheme))
    gplq.export(model, tmp_path / 'model.onnx', images[:2])
    packed = [t for t in onnx.load(tmp_path / 'model.onnx').graph.initializer if t.name.endswith('.packed')]
    assert {t.data_type for t in packed} <= {onnx.TensorProto.INT4, onnx.TensorProto.UINT4}
    layers = {n: p.numel() // 2 for n, p in model.named_parameters() if n.endswith('weight') and p.dim() > 1}
    # With a zero point a channel can have seventeen different sixteens.
    halves = 2 if scheme == 'mse' else 1
    expected = [count for name, count in layers.items() for _ in range(1 if name.startswith('blocks') else halves)]
    assert sorted(len(t.raw_data) for t in packed) == sorted(expected)


def test_the_model_stays(quantized: Callable[..., nn.Module], images: Tensor, tmp_path: Path) -> None:
    model = quantized('w4a4')
    with torch.no_grad():
        before = model(images)
        gplq.export(model, tmp_path / 'model.onnx', images[:2])
        assert torch.equal(model(images), before)
    gplq.save(model, tmp_path / 'model.safetensors')


def test_a_part(quantized: Callable[..., nn.Module], images: Tensor, tmp_path: Path) -> None:
    model = quantized('w4a4')
    tokens = torch.randn(3, 16, 16)
    gplq.export(model, tmp_path / 'block.onnx', tokens[:2], part='blocks.0')
    with torch.no_grad():
        expected = model.get_submodule('blocks.0')(tokens)
    assert torch.allclose(Session(tmp_path / 'block.onnx')(tokens), expected, atol=1e-4)
    with pytest.raises(TargetError, match="no part 'block'"):
        gplq.export(model, tmp_path / 'block.onnx', tokens, part='block')


def test_without_an_example(quantized: Callable[..., nn.Module], images: Tensor, tmp_path: Path) -> None:
    model = quantized('w4a4')
    with pytest.raises(CalibrationError, match='says no image size that it is made for: export needs example_inputs'):
        gplq.export(model, tmp_path / 'model.onnx')
    model.img_size = images.shape[-1]
    gplq.export(model, tmp_path / 'model.onnx')
    with torch.no_grad():
        assert torch.allclose(Session(tmp_path / 'model.onnx')(images[:3]), model(images[:3]), atol=1e-4)


@pytest.mark.parametrize('count', [1, 2, 8])
def test_a_batch_of_one_size_runs_on_integers_too(
    quantized: Callable[..., nn.Module], images: Tensor, tmp_path: Path, count: int
) -> None:
    model = quantized('w4a4')
    gplq.export(model, tmp_path / 'model.onnx', images[:count], fixed_batch=True)
    session = Session(tmp_path / 'model.onnx')
    assert session.operations['MatMulIntegerToFloat'] == 2 * 2 + 2 * (4 + 2)
    assert not {'MatMul', 'Gemm', 'Conv', 'DequantizeLinear'} & set(session.operations)
    with torch.no_grad():
        assert torch.allclose(session(images[:count]), exported_twin(model)(images[:count]), atol=1e-5)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
def test_files_compute_in_single_precision(
    toy_vit: Callable[..., nn.Module], images: Tensor, tmp_path: Path, dtype: torch.dtype
) -> None:
    model = quantized_on(toy_vit().to(dtype), images.to(dtype))
    gplq.export(model, tmp_path / 'model.onnx', images[:2].to(dtype))
    session = Session(tmp_path / 'model.onnx')
    assert session.operations['MatMulIntegerToFloat'] == 2 * 2 + 2 * (4 + 2)
    with torch.no_grad():
        expected = model(images.to(dtype)).float()
    assert next(model.parameters()).dtype == dtype
    # A code that bfloat16 moves to its neighbor is a step of 4 bits.
    assert float((session(images) - expected).norm() / expected.norm()) < (0.2 if dtype == torch.bfloat16 else 1e-3)


@pytest.mark.parametrize(
    ('example', 'told'),
    [
        (lambda x: x.byte(), r'floating-point numbers.*got torch.uint8, \(2, 3'),
        (lambda x: x[:0], 'with a sample at least'),
        (lambda x: x.numpy(), 'got ndarray'),
        (lambda x: [], 'is empty'),
        (lambda x: 7, 'got int'),
        (lambda x: x[:, :2], r'ToyViT does not take example_inputs of \(2, 2, '),
        (lambda x: (x, x.float()), r'does not take example_inputs of \(2, 3.* and \(2, 3'),
    ],
)
def test_examples_that_the_model_does_not_take(
    quantized: Callable[..., nn.Module], images: Tensor, tmp_path: Path, example: Callable[[Tensor], Any], told: str
) -> None:
    with pytest.raises(CalibrationError, match=told):
        gplq.export(quantized('w4a4'), tmp_path / 'model.onnx', example(images[:2]))


def test_a_place_that_cannot_be_written_is_told_before_the_model_is_traced(
    quantized: Callable[..., nn.Module], images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = quantized('w4a4')
    monkeypatch.setattr(import_module('gplq.export'), 'onnx_graph', lambda *_: pytest.fail('traced'))
    with pytest.raises(WriteError, match='is a folder'):
        gplq.export(model, tmp_path, images[:2])
    (tmp_path / 'file').touch()
    with pytest.raises(WriteError, match='model.onnx cannot be written'):
        gplq.export(model, tmp_path / 'file' / 'model.onnx', images[:2])


def test_what_cannot_be_exported(
    toy_vit: Callable[..., nn.Module], quantized: Callable[..., nn.Module], images: Tensor, tmp_path: Path
) -> None:
    path = tmp_path / 'model.onnx'
    with pytest.raises(StageError, match='not prepared'):
        gplq.export(toy_vit(), path, images[:2])
    with pytest.raises(TargetError, match='fold=False'):
        gplq.export(quantized(gplq.Recipe.gplq(fold=False)), path, images[:2])
    assert not path.exists()


class DependsOnBatch(nn.Module):
    """Goes through its samples one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.layer(sample) for sample in x])


def test_a_fixed_batch(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 16)
    model = DependsOnBatch()
    gplq.prepare(model, 'w4a4', x)
    gplq.calibrate(model, [x])
    gplq.quantize_weights(model, [x])
    with pytest.raises(TargetError, match='fixed_batch=True'):
        gplq.export(model, tmp_path / 'model.onnx', x)
    gplq.export(model, tmp_path / 'model.onnx', x, fixed_batch=True)
    with torch.no_grad():
        assert torch.allclose(Session(tmp_path / 'model.onnx')(x), model(x), atol=1e-5)
