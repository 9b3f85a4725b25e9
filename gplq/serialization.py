"""Save a quantized model as packed codes in one safetensors file, and load it without trusting the file."""

from __future__ import annotations

import copy
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from gplq.compensation import attach_compensation
from gplq.errors import CheckpointError, StageError
from gplq.files import write_atomically
from gplq.fingerprint import fingerprint
from gplq.insert import insert
from gplq.layers import CompensatedBlock, LinearCompensation, WeightView
from gplq.packing import pack, unpack
from gplq.plan import MapPlan, Plan
from gplq.recipe import WEIGHT_STAGE_FIELDS, WEIGHT_TRAINING_FIELDS
from gplq.record import Stage, named_quantizers, record_of, weight_views
from gplq.spec import FLOAT_BITS

__all__ = ['adopt', 'describe', 'load', 'restore', 'save', 'trains_weights']

FORMAT = 'gplq-1'
_PACKED = '.packed'
_HASH = 'sha256'


def describe(model: nn.Module) -> dict[str, str]:
    """The state of a prepared model beyond its tensors, as strings that travel in a checkpoint's metadata."""
    record = record_of(model)
    compensated = [name for name, m in model.named_modules() if isinstance(m, CompensatedBlock)]
    corrected = [view.name for _, view in weight_views(model) if view.map.corrected]
    signs = {name: q.spec.signed for name, q in named_quantizers(model) if q.spec.signed is not None}
    return {
        'format': FORMAT,
        'plan': record.plan.with_signs(signs).to_json(),
        'stage': record.stage.value,
        'trained': json.dumps(record.trained),
        'compensated': json.dumps(compensated),
        'corrected': json.dumps(corrected),
    }


def restore(model: nn.Module, description: dict[str, str]) -> None:
    """Give a fresh model the structure and stage that :func:`describe` wrote; tensors are loaded afterwards.

    Raises:
        CheckpointError: if the description is damaged or names modules that the model lacks.
    """
    stage, trained, plan, compensated, corrected = _parse(description)
    insert(model, plan)
    for name in compensated:
        block = model.get_submodule(name)
        layer = LinearCompensation(_block_channels(model, name), plan.recipe.compensation_bits)
        layer.input.enabled = True
        attach_compensation(block, layer.to(_device(model)))
    _enter_stage(model, stage, trained, corrected)


def adopt(model: nn.Module, description: dict[str, str]) -> None:
    """Bring a prepared model to the stage of a checkpoint of the same recipe; tensors are loaded afterwards.

    Before the weights are quantized the recipe may differ in what only the weight stage decides: the model keeps its
    own, and its weight quantizers wait for their tensors. A model whose weights are to be rounded in training takes a
    checkpoint of the activation stage alone, too: :func:`gplq.weight_training.start_weight_training` is next then.

    Raises:
        CheckpointError: if the checkpoint was written under another recipe or for other sites.
    """
    record = record_of(model)
    stage, trained, plan, _, corrected = _parse(description)
    ours, theirs = record.plan.recipe.to_dict(), plan.recipe.to_dict()
    open_still = frozenset() if stage is Stage.QUANTIZED else WEIGHT_STAGE_FIELDS
    if record.plan.recipe.train_weights and not plan.recipe.train_weights:
        open_still |= WEIGHT_TRAINING_FIELDS
    differing = sorted(key for key in ours.keys() - open_still if ours[key] != theirs[key])
    if differing:
        told = ', '.join(f'{key}: {theirs[key]} there, {ours[key]} here' for key in differing)
        raise CheckpointError(f'the checkpoint was written under another recipe ({told})')
    here = [(m.name, m.kind) for m in record.plan.maps] + [(p.owner, str(p.index)) for p in record.plan.products]
    there = [(m.name, m.kind) for m in plan.maps] + [(p.owner, str(p.index)) for p in plan.products]
    if here != there:
        raise CheckpointError('the checkpoint quantizes other layers than this model: it is of another architecture')
    operands = plan.operands()
    for name, quantizer in named_quantizers(model):
        quantizer.spec = operands[name].spec
    _enter_stage(model, stage, trained, corrected)


def trains_weights(description: dict[str, str]) -> bool:
    """Whether the model of a checkpoint rounded its weights while it trained."""
    _, _, plan, _, _ = _parse(description)
    return plan.recipe.train_weights


def _enter_stage(model: nn.Module, stage: Stage, trained: bool, corrected: list[str]) -> None:
    """Switch on what a model of this stage uses."""
    record_of(model).stage, record_of(model).trained = stage, trained
    for _, quantizer in named_quantizers(model):
        quantizer.enabled = stage is not Stage.PREPARED
        if stage is Stage.QUANTIZED:
            quantizer.requires_grad_(False)
    for _, view in weight_views(model):
        view.map.corrected = view.name in corrected
        if view.map.weight is not None:
            view.map.weight.enabled = stage is Stage.QUANTIZED
            view.map.weight.learning = stage is Stage.CALIBRATED and view.map.weight.log_scale is not None
            if stage is Stage.QUANTIZED:
                view.map.weight.forget_learning()
                view.freeze()


def _parse(description: dict[str, str]) -> tuple[Stage, bool, Plan, list[str], list[str]]:
    """Stage, whether activations were trained, plan, compensated blocks and corrected layers, unvouched for."""
    found = description.get('format') if isinstance(description, dict) else None
    if found != FORMAT:
        ours = isinstance(found, str) and found.startswith(FORMAT.rstrip('0123456789'))
        reason = (
            'it was written by another version of gplq: use that one' if ours else 'it was not written by gplq.save'
        )
        raise CheckpointError(f"the file's format is {found!r:.40}, not {FORMAT!r}: {reason}")
    try:
        stage = Stage(description['stage'])
        # Files that do not say are of the activation stage, which kept them behind its training.
        trained = json.loads(description.get('trained', 'true'))
        plan = Plan.from_json(description['plan'])
        compensated, corrected = json.loads(description['compensated']), json.loads(description['corrected'])
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"the file's description is damaged: {error}") from None
    if not _names(compensated) or not set(compensated) <= set(plan.blocks) or not _names(corrected):
        raise CheckpointError(f'the file compensates {compensated!r:.80}, which its plan does not list as blocks')
    return stage, trained is True, plan, compensated, corrected


def _names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _block_channels(model: nn.Module, block: str) -> int:
    """Width of a block: the first linear map inside it reads the residual stream."""
    for plan, view in weight_views(model):
        if plan.name.startswith(f'{block}.') or plan.name == block:
            return int(view.matrix().shape[1])
    raise CheckpointError(f'the file compensates block {block!r}, in which no layer is quantized')


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write all tensors, quantized weights as packed codes, with the recipe as JSON metadata.

    The file is complete or absent: it is written beside its place and moved there.

    Raises:
        StageError: if the weights are not quantized, or were changed since.
    """
    record = record_of(model)
    if record.stage is not Stage.QUANTIZED:
        raise StageError(f'the model is {record.stage.value}: call gplq.quantize_weights before gplq.save')
    tensors = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    for plan, view in weight_views(model):
        weight = view.map.weight
        if weight is None or plan.weight_bits == FLOAT_BITS:
            continue
        codes = view.codes().cpu()
        tensors.pop(f'{plan.name}.{view.parameter}', None)
        tensors[_packed_key(plan, view)] = pack(codes, plan.weight_bits, signed=weight.zero_point is None)
    # Tied tensors are stored once each: safetensors refuses memory that two names share.
    tensors = {name: t.clone() for name, t in tensors.items()}
    metadata = describe(model)
    metadata[_HASH] = _fingerprint(tensors, metadata)
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))


def load(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Turn a fresh FP32 model into the quantized one that :func:`save` wrote, and return it.

    Nothing in the file is executed. Its shapes are checked against the model before a tensor is read, and a file that
    is refused leaves the model as it was.

    Raises:
        CheckpointError: if the file is missing, damaged, or belongs to another architecture.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f'{path} does not exist')
    trial = _outline(model)
    try:
        with safe_open(path, framework='pt') as file:
            description = file.metadata() or {}
            restore(trial, description)
            tensors = _read(trial, file, path)
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
        if _HASH not in description:
            raise CheckpointError(f'{path} has no hash of its contents: gplq.save writes one, so save the model anew')
        if description[_HASH] != _fingerprint(stored, description):
            raise CheckpointError(f'{path} is damaged: its contents do not match the hash that was saved with them')
    except SafetensorError as error:
        if zipfile.is_zipfile(path):
            raise CheckpointError(
                f'{path} was not written by gplq.save but by torch.save: give the .safetensors file beside it'
            ) from None
        raise CheckpointError(
            f'{path} is not a readable safetensors file ({error}): it may be truncated, or be of another kind'
        ) from None
    restore(model, description)
    model.load_state_dict(tensors)
    return model


def _packed_key(plan: MapPlan, view: WeightView) -> str:
    """Where the codes of a weight are in a file; projections that share a parameter have some of its rows each."""
    part = '' if view.rows is None else f'.{plan.kind}'
    return f'{plan.name}.{view.parameter}{part}{_PACKED}'


def _fingerprint(tensors: dict[str, Tensor], description: dict[str, str]) -> str:
    """Of everything in a file but this hash itself."""
    return fingerprint(tensors, json.dumps({**description, _HASH: ''}, sort_keys=True))


def _outline(model: nn.Module) -> nn.Module:
    """A copy of the modules that shares the memory of every parameter and buffer with ``model``."""
    known: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    known |= {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, known)


def _read(model: nn.Module, file: Any, path: Path) -> dict[str, Tensor]:
    expected = model.state_dict()
    names = set(file.keys())
    tensors: dict[str, Tensor] = {}
    packed = {}
    for plan, view in weight_views(model):
        if plan.weight_bits != FLOAT_BITS:
            packed[_packed_key(plan, view)] = (plan, view)
    rounded = {f'{plan.name}.{view.parameter}' for plan, view in packed.values()}
    missing = sorted((set(expected) - rounded) - names) + sorted(set(packed) - names)
    foreign = sorted(names - set(expected) - set(packed))
    if missing or foreign:
        raise CheckpointError(
            f'{path} does not fit this {type(model).__name__}: {len(missing)} tensors are missing {missing[:3]}, '
            f'{len(foreign)} are foreign {foreign[:3]}'
        )
    for name in names - set(packed):
        shape, dtype = file.get_slice(name).get_shape(), expected[name].dtype
        if list(shape) != list(expected[name].shape):
            raise CheckpointError(
                f"{path}: {name} has shape {list(shape)}, this model's has {list(expected[name].shape)}"
            )
        tensors[name] = file.get_tensor(name).to(dtype)
        # A model may keep an open bound, infinite by design, among its own buffers.
        bounded = tensors[name].isfinite() | ~expected[name].isfinite()
        if tensors[name].is_floating_point() and not bool((bounded & ~tensors[name].isnan()).all()):
            raise CheckpointError(f'{path}: {name} holds NaN or infinite values')
    state = {**{name: t for name, t in expected.items() if name in rounded}, **tensors}
    for name in rounded:
        state[name] = expected[name].detach().clone()
    for key, (plan, view) in packed.items():
        assert view.map.weight is not None
        prefix = f'{plan.name}.{plan.attribute}'
        weight, matrix = view.map.weight, view.matrix()
        codes = unpack(file.get_tensor(key), matrix.numel(), plan.weight_bits, signed=weight.zero_point is None)
        view.map.load_state_dict(
            {n.removeprefix(f'{prefix}.'): t for n, t in tensors.items() if n.startswith(f'{prefix}.')}
        )
        column_scale = view.map.column_scale.expand(matrix.shape[1])
        values = weight.restore(codes.reshape(matrix.shape).to(column_scale), column_scale)
        target = state[f'{plan.name}.{view.parameter}']
        rows = slice(None) if view.rows is None else slice(view.first_row, view.first_row + view.rows)
        target[rows] = values.reshape(target[rows].shape)
    return state


def _device(model: nn.Module) -> torch.device:
    parameter = next(model.parameters(), None)
    return torch.device('cpu') if parameter is None else parameter.device
