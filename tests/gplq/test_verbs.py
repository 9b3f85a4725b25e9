"""The verbs together: their order, what they refuse, integers, summary, and files that cannot be trusted."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import gplq
from gplq import integer
from gplq.errors import CalibrationError, CheckpointError, GPLQError, StageError, TargetError
from gplq.fingerprint import fingerprint
from gplq.record import is_prepared, named_products, weight_views

Make = Callable[..., nn.Module]
QUICK: dict[str, Any] = {'exponents': (0.0, 0.5, 1.0), 'clips': (1.0, 0.7)}


def recipe(weight_bits: int = 4, activation_bits: int = 4, **settings: Any) -> gplq.Recipe:
    return gplq.Recipe.gplq(weight_bits, activation_bits, **{**QUICK, **settings})


# Order


def test_order(toy_vit: Make, images: Tensor, tmp_path: Path) -> None:
    model = toy_vit(depth=1)
    for verb in (
        lambda: gplq.calibrate(model, [images]),
        lambda: gplq.quantize_weights(model, [images]),
        lambda: gplq.summary(model),
        lambda: gplq.save(model, tmp_path / 'x'),
    ):
        with pytest.raises(StageError, match='not prepared'):
            verb()
    gplq.prepare(model, recipe(), images[:2])
    with pytest.raises(StageError, match=r'gplq\.calibrate first'):
        gplq.quantize_weights(model, [images])
    gplq.calibrate(model, [images])
    with pytest.raises(StageError, match='quantize_weights before'):
        gplq.save(model, tmp_path / 'x')
    with pytest.raises(StageError, match='calibration batches'):
        gplq.quantize_weights(model)
    gplq.quantize_weights(model, [images])
    with pytest.raises(StageError, match='already'):
        gplq.quantize_weights(model, [images])
    with pytest.raises(StageError, match='quantized'):
        gplq.train_activations(model, [images])
    with pytest.raises(StageError, match='quantized'):
        gplq.calibrate(model, [images])


# Calibration data


@pytest.mark.parametrize(
    ('batches', 'told'),
    [
        ([], 'no calibration batch'),
        ([torch.empty(0, 3, 16, 16)], 'batch 0 is empty'),
        ([torch.ones(2, 3, 16, 16), torch.full((2, 3, 16, 16), float('nan'))], 'batch 1 holds NaN'),
        ([(torch.full((2, 3, 16, 16), float('inf')), torch.zeros(2))], 'infinite'),
    ],
)
def test_batches_of_no_use(toy_vit: Make, images: Tensor, batches: list[Any], told: str) -> None:
    model = toy_vit(depth=1)
    gplq.prepare(model, recipe(), images[:2])
    with pytest.raises(CalibrationError, match=told):
        gplq.calibrate(model, batches)
    # The refusal leaves no observer behind.
    gplq.calibrate(model, [images])


def test_calibration_leaves_mode_and_random_state(toy_vit: Make, images: Tensor) -> None:
    model = toy_vit(depth=1).train()
    gplq.prepare(model, recipe(), images[:2])
    state = torch.random.get_rng_state()
    gplq.calibrate(model, iter([images[:8], images[8:]]))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training


def test_a_site_that_calibration_never_reaches(toy_vit: Make, images: Tensor) -> None:
    model = toy_vit(depth=1)
    gplq.prepare(model, recipe(), images[:2])
    with pytest.raises(CalibrationError, match=r'blocks\.0.*never reached'):
        gplq.calibrate(model, [images], forward=lambda m, batch: m.patch_embed(batch))


# Integers


@pytest.mark.parametrize(
    'settings',
    [
        {},
        {'fused': True},
        {'gelu_output': 'unsigned_offset'},
        {'weight_scheme': 'percentile_asymmetric'},
        {'weight_scheme': 'percentile', 'compensation': 'none', 'product_observer': 'percentile'},
        {'compensation': 'affine'},
        {'rounding': 'nearest'},
        {'compensation': 'qwt'},
        {'linear_input': 'tensor', 'linear_observer': 'min_max'},
        {'gelu_output': 'unsigned_offset', 'linear_input': 'tensor', 'weight_scheme': 'percentile_asymmetric'},
    ],
    ids=str,
)
def test_the_forward_is_recomputed_from_integer_codes(
    toy_vit: Make, images: Tensor, tmp_path: Path, settings: dict[str, Any]
) -> None:
    fused = settings.pop('fused', False) if 'fused' in settings else False
    model = toy_vit(depth=1, fused=fused)
    gplq.prepare(model, recipe(**settings), images[:2])
    gplq.calibrate(model, [images])
    gplq.quantize_weights(model, [images])
    seen: dict[str, tuple[Tensor, ...]] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda *tensors: seen.__setitem__(name, tuple(t.clone() for t in tensors))

    for _, view in weight_views(model):
        view.map.watcher = keep(view.name)
    for name, product in named_products(model):
        product.watcher = keep(name)
    with torch.no_grad():
        found = model(images)
    for _, view in weight_views(model):
        view.map.watcher = None
        x, y = seen[view.name]
        assert torch.allclose(integer.linear_from_codes(view, x), y, atol=1e-4), view.name
        codes = integer.integer_linear(view).codes
        assert codes.dtype == torch.int64
    for name, product in named_products(model):
        product.watcher = None
        left, right, y = seen[name]
        assert torch.allclose(integer.product_from_codes(product, left, right), y, atol=1e-4), name
    gplq.save(model, tmp_path / 'model.safetensors')
    with torch.no_grad():
        assert torch.equal(gplq.load(toy_vit(depth=1, fused=fused), tmp_path / 'model.safetensors')(images), found)


def test_unfolded_scales_have_no_integer_product(toy_vit: Make, images: Tensor) -> None:
    model = toy_vit(depth=1)
    gplq.prepare(model, recipe(fold=False, compensation='none', rounding='nearest'), images[:2])
    gplq.calibrate(model, [images])
    with pytest.raises(StageError, match='not both quantized'):
        integer.integer_linear(next(view for _, view in weight_views(model)))
    gplq.quantize_weights(model)
    views = {view.name: view for _, view in weight_views(model)}
    with pytest.raises(TargetError, match='no integer product'):
        integer.integer_linear(views['blocks.0.fc1'])


def test_a_weight_changed_afterwards_is_noticed(quantized: Make) -> None:
    model = quantized(recipe(compensation='none'), depth=1)
    with torch.no_grad():
        model.get_submodule('head').weight.mul_(1.01)  # type: ignore[union-attr, operator]
    view = next(view for _, view in weight_views(model) if view.name == 'head')
    with pytest.raises(StageError, match='changed after'):
        integer.integer_linear(view)


# Accuracy in order


def test_more_bits_are_closer(toy_vit: Make, images: Tensor, relative_error: Callable[..., float]) -> None:
    errors = []
    reference = toy_vit(depth=1)
    for bits in (8, 4, 2):
        model = copy.deepcopy(reference)
        gplq.prepare(model, recipe(bits, bits), images[:2])
        gplq.calibrate(model, [images])
        gplq.quantize_weights(model, [images])
        with torch.no_grad():
            errors.append(relative_error(model(images), reference(images)))
    assert errors[0] < 0.03 < errors[1] < errors[2]


# Summary


def test_summary(quantized: Make) -> None:
    model = quantized(recipe(compensation='none'), depth=1)
    found = gplq.summary(model)
    assert (found.recipe, found.stage) == ('w4a4', 'quantized')
    assert len(found.sites) == 6 + 4
    weights = {row.name: row for row in found.weights}
    # 48 x 16 codes at half a byte and 48 scales of four bytes.
    assert weights['blocks.0.attn.qkv'].bytes == 48 * 16 // 2 + 48 * 4
    assert weights['head'].bytes == 5 * 16 + 5 * 4
    assert all(row.rounded for row in found.weights)
    assert found.quantized_multiplications == 1.0
    wide, narrow = 16 * 48 + 5 * 16, 48 * 16 + 16 * 16 + 2 * 32 * 16
    assert found.effective_bits == pytest.approx((8 * wide + 4 * narrow) / (wide + narrow))
    fp32 = sum(p.numel() for n, p in model.named_parameters() if 'quant' not in n) * 4
    assert found.float_bytes == fp32
    assert found.quantized_bytes == pytest.approx(4 * (wide + narrow) / fp32)
    text = str(found)
    assert 'blocks.0.attn' in text and 'in floating point' in text and 'LayerNorm' in text


def test_summary_counts_what_stays_in_floating_point(toy_vit: Make, images: Tensor) -> None:
    model = toy_vit(depth=1)
    plan = gplq.prepare(model, recipe(skip=('blocks.0.fc1',)), images[:2])
    found = gplq.summary(model)
    left = next(row for row in found.floating if row.name == 'blocks.0.fc1')
    total = sum(m.multiplications for m in plan.maps) + sum(p.multiplications for p in plan.products)
    assert left.multiplications == 2 * 16 * 16 * 32
    assert found.quantized_multiplications == pytest.approx(total / (total + left.multiplications))
    assert not any(row.calibrated for row in found.sites)
    assert 'not calibrated' in str(found)


# Files


@pytest.fixture
def saved(quantized: Make, tmp_path: Path) -> Path:
    """A file of a small quantized model."""
    path = tmp_path / 'folder' / 'model.safetensors'
    gplq.save(quantized(recipe(compensation='none'), depth=1), path)
    return path


def rewritten(path: Path, change: Callable[[dict[str, Tensor], dict[str, str]], None]) -> Path:
    tensors = load_file(path)
    with safe_open(path, 'pt') as file:
        metadata = dict(file.metadata())
    change(tensors, metadata)
    # Whoever forges a file gives it a hash that fits.
    metadata['sha256'] = fingerprint(tensors, json.dumps({**metadata, 'sha256': ''}, sort_keys=True))
    save_file(tensors, path, metadata=metadata)
    return path


def test_four_bit_weights_take_half_a_byte(saved: Path) -> None:
    tensors = load_file(saved)
    packed = tensors['blocks.0.attn.qkv.weight.packed']
    assert packed.dtype == torch.uint8 and packed.numel() == 48 * 16 // 2
    assert 'blocks.0.attn.qkv.weight' not in tensors
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


def test_the_recipe_travels(saved: Path) -> None:
    with safe_open(saved, 'pt') as file:
        values = json.loads(file.metadata()['plan'])['recipe']
    assert gplq.Recipe.from_dict(values) == recipe(compensation='none')


def check_untouched(model: nn.Module, expected: nn.Module, x: Tensor) -> None:
    assert not is_prepared(model)
    assert [type(module) for module in model.modules()] == [type(module) for module in expected.modules()]
    assert {name: p.requires_grad for name, p in model.named_parameters()} == {
        name: p.requires_grad for name, p in expected.named_parameters()
    }
    with torch.no_grad():
        assert torch.equal(model(x), expected(x))


def test_loading_touches_no_other_architecture(toy_vit: Make, images: Tensor, saved: Path) -> None:
    for other in (toy_vit(depth=2), toy_vit(width=32, depth=1), nn.Sequential(nn.Flatten(), nn.Linear(768, 3))):
        expected = copy.deepcopy(other)
        with pytest.raises(CheckpointError):
            gplq.load(other, saved)
        check_untouched(other, expected, images)


@pytest.mark.parametrize('share', [0.0, 0.01, 0.5, 0.99])
def test_truncated(toy_vit: Make, saved: Path, share: float) -> None:
    data = saved.read_bytes()
    saved.write_bytes(data[: int(share * len(data))])
    with pytest.raises(CheckpointError, match='truncated'):
        gplq.load(toy_vit(depth=1), saved)


def test_a_checkpoint_of_torch_is_named(toy_vit: Make, tmp_path: Path) -> None:
    model = toy_vit(depth=1)
    torch.save(model.state_dict(), tmp_path / 'model.pth')
    with pytest.raises(CheckpointError, match='torch.save: give the .safetensors file'):
        gplq.load(model, tmp_path / 'model.pth')


def test_a_flipped_bit(toy_vit: Make, images: Tensor, saved: Path) -> None:
    """Wherever it is: in the header, in the plan, in a code."""
    sound = saved.read_bytes()
    header = 8 + int.from_bytes(sound[:8], 'little')
    places = [3, 8, 30, sound.index(b'"plan"') + 40, sound.index(b'sha256') + 12, header, header + 99, len(sound) - 1]
    for place in places:
        damaged = bytearray(sound)
        damaged[place] ^= 1
        saved.write_bytes(damaged)
        model = toy_vit(depth=1)
        with pytest.raises(CheckpointError):
            gplq.load(model, saved)
        check_untouched(model, toy_vit(depth=1), images)


def test_a_file_from_the_future(toy_vit: Make, saved: Path) -> None:
    def renamed(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        metadata['format'] = 'gplq-9'

    with pytest.raises(CheckpointError, match="'gplq-9', not 'gplq-1': it was written by another version"):
        gplq.load(toy_vit(depth=1), rewritten(saved, renamed))


def test_missing_file(toy_vit: Make, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match='does not exist'):
        gplq.load(toy_vit(), tmp_path / 'nothing')


class Bomb:
    """Creates a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_pickle_is_refused_and_not_executed(toy_vit: Make, tmp_path: Path) -> None:
    torch.save({'model': Bomb(tmp_path / 'executed')}, tmp_path / 'model.pth')
    with pytest.raises(CheckpointError):
        gplq.load(toy_vit(), tmp_path / 'model.pth')
    assert not (tmp_path / 'executed').exists()


def _nan(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    tensors['norm.weight'][0] = float('nan')


def _infinite(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    tensors['norm.weight'][0] = float('inf')


def _missing(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    del tensors['head.bias']


def _unpacked(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    del tensors['head.weight.packed']


def _foreign(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    tensors['guest'] = torch.ones(1)


def _shape(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    tensors['norm.weight'] = torch.ones(3)


def _short(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    tensors['head.weight.packed'] = tensors['head.weight.packed'][1:].clone()


def _format(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    metadata['format'] = 'pt'


def _no_plan(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    del metadata['plan']


def _broken_plan(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    metadata['plan'] = metadata['plan'][:-5]


def _plan_of_lists(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    metadata['plan'] = '[]'


def _huge(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    plan = json.loads(metadata['plan'])
    plan['maps'][0]['rows'] = 2**40
    metadata['plan'] = json.dumps(plan)


def _stage(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    metadata['stage'] = 'finished'


def _blocks(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    metadata['compensated'] = '["head"]'


@pytest.mark.parametrize(
    'change',
    [
        _nan,
        _infinite,
        _missing,
        _unpacked,
        _foreign,
        _shape,
        _short,
        _format,
        _no_plan,
        _broken_plan,
        _plan_of_lists,
        _huge,
        _stage,
        _blocks,
    ],
)
def test_damaged_files(toy_vit: Make, images: Tensor, saved: Path, change: Callable[..., None]) -> None:
    sound = saved.read_bytes()
    rewritten(saved, change)
    model = toy_vit(depth=1)
    with pytest.raises(GPLQError) as error:
        gplq.load(model, saved)
    assert isinstance(error.value, CheckpointError)
    check_untouched(model, toy_vit(depth=1), images)
    # And can still be given the file as it was.
    saved.write_bytes(sound)
    gplq.load(model, saved)
