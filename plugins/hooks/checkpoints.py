"""Checkpoints that a run starts from: readable, harmless, of this architecture, loaded at all."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from mmengine.runner import Runner
from torch import nn

from gplq.errors import CheckpointError
from gplq.layers import LinearCompensation, LinearMap
from gplq.plugins.safe_load import allow_mmengine_objects
from gplq.products import QuantizedProduct
from gplq.record import Stage
from gplq.weights import WeightQuantizer

__all__ = ['check_keys', 'check_source', 'complete', 'load_weights', 'quantization_of', 'read_checkpoint', 'tensors_of']

REMEDY = "set load_from (or --cfg-options load_from=PATH) to the FP32 checkpoint of this config's model"

# Modules whose tensors a checkpoint of a stage cannot have yet.
LATER: dict[Stage, tuple[type[nn.Module], ...]] = {
    Stage.PREPARED: (LinearMap, QuantizedProduct, LinearCompensation),
    Stage.CALIBRATED: (WeightQuantizer,),
    Stage.QUANTIZED: (),
}


def check_source(runner: Runner, *, required: bool = True) -> None:
    """Refuse a run that would start from random weights or from a file that cannot be read.

    Args:
        runner: before it loads.
        required: whether a checkpoint must be loaded; a test may have been given its weights otherwise.

    Raises:
        CheckpointError: nothing will be loaded, or the file is missing, damaged or holds foreign objects.
    """
    path = runner._load_from
    if runner._resume and not path:
        raise CheckpointError(f'there is no checkpoint to resume in {runner.work_dir}: start without --resume')
    if not path:
        if not required:
            return
        raise CheckpointError(f'nothing is loaded into the model: GPLQ starts from a trained model; {REMEDY}')
    if '://' not in str(path):
        read_checkpoint(path)


def read_checkpoint(path: str) -> dict[str, Any]:
    """Read a checkpoint without executing anything in it; tensors stay on disk until they are used.

    Raises:
        CheckpointError: if it is missing, damaged, of another kind or holds foreign objects.
    """
    if not Path(path).is_file():
        raise CheckpointError(f'checkpoint {path} does not exist; {REMEDY}')
    _check_kind(Path(path))
    allow_mmengine_objects()
    # Files from before torch 1.6 are no archives and cannot be mapped.
    archive = zipfile.is_zipfile(path)
    if archive and (damage := _damage(path)):
        raise CheckpointError(f'checkpoint {path} is damaged: {damage}; copy or download it anew')
    try:
        checkpoint = torch.load(path, map_location='cpu', weights_only=True, mmap=archive)
    except Exception as error:
        # What an unpickler says of bytes that nobody vouches for can be any error.
        told = str(error)
        reason = told[max(told.find('Unsupported'), 0) :].partition('\n')[0][:200]
        if isinstance(error, pickle.UnpicklingError) and 'Unsupported operand' not in told:
            raise CheckpointError(
                f'checkpoint {path} holds objects that are not data and was not read ({reason}); '
                'save it anew with nothing but its state_dict'
            ) from None
        raise CheckpointError(
            f'checkpoint {path} cannot be read, it may be truncated or not written by torch.save '
            f'({type(error).__name__}: {reason})'
        ) from None
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f'checkpoint {path} holds a {type(checkpoint).__name__}, not a state dict')
    return checkpoint


def _damage(path: str) -> str | None:
    """What is wrong with the first member of an archive whose bytes changed since they were written."""
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                if member.compress_type != zipfile.ZIP_STORED:
                    # Unpacking what nobody vouches for could take all memory.
                    return f'{member.filename} in it is compressed, which torch.save never does'
            changed = archive.testzip()
            return changed and (
                f'{changed} in it does not match its checksum (unless it was written without, by '
                'torch.serialization.set_crc32_options(False): then save it anew with)'
            )
    except Exception as error:  # names, sizes and flags that nobody vouches for
        return f'{type(error).__name__}: {error}'


def _check_kind(path: Path) -> None:
    """Refuse what `torch.save` did not write, by its first bytes, and say what it is."""
    with path.open('rb') as file:
        head = file.read(200)
    # An archive, a pickle from before torch 1.6, or nothing, which was cut off.
    if not head or head.startswith((b'PK', b'\x80')):
        return
    text = head.decode(errors='ignore')
    if 8 + int.from_bytes(head[:8], 'little') <= path.stat().st_size and head[8:9] == b'{':
        found = 'is a safetensors file'
        remedy = 'gplq.load reads those that GPLQ wrote; give the .pth beside it'
    elif text.startswith('version https://git-lfs'):
        found, remedy = 'is a Git LFS pointer, not the file itself', 'fetch it with `git lfs pull`'
    elif ''.join(text.split()).isprintable():
        found = f'is text, beginning with {" ".join(text.split())[:40]!r}'
        remedy = 'if it was downloaded, the server answered with a message: download it again'
    else:
        found, remedy = f'is no checkpoint of torch, it begins with {head[:8]!r}', 'unpack or convert it first'
    raise CheckpointError(f'checkpoint {path} {found}; {remedy}')


def quantization_of(checkpoint: dict[str, Any]) -> dict[str, str] | None:
    """What a checkpoint says about its quantization, None if it holds an FP32 model."""
    meta = checkpoint.get('meta')
    return meta.get('gplq') if isinstance(meta, dict) else None


def tensors_of(checkpoint: dict[str, Any], source: str) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint by their names in the model.

    Raises:
        CheckpointError: if there are none where mmengine looks for them.
    """
    state = checkpoint.get('state_dict', checkpoint)
    if isinstance(state, dict):
        named = {name: value for name, value in state.items() if isinstance(name, str)}
        tensors = {n.removeprefix('module.'): t for n, t in named.items() if isinstance(t, torch.Tensor)}
        if tensors:
            return tensors
    raise CheckpointError(
        f"{source} has no tensors, neither under 'state_dict' nor at its top, where it holds {list(checkpoint)[:5]}; "
        "save it anew as {'state_dict': …}"
    )


def load_weights(model: nn.Module, path: str, config: str) -> None:
    """Load a model that takes part in a run without being its own, such as a teacher.

    Raises:
        CheckpointError: if the file cannot be read, or is not of this very model, which is the config's.
    """
    try:
        model.load_state_dict(tensors_of(read_checkpoint(path), path))
    except RuntimeError as error:
        # A line for each kind of difference and tensor, after one that names the class.
        reason = str(error).splitlines()[-1].strip()[:200]
        raise CheckpointError(f'{path} is not a checkpoint of {config}: {reason}') from None


def check_keys(model: nn.Module, checkpoint: dict[str, Any], source: str, stage: Stage = Stage.PREPARED) -> list[str]:
    """Check that every tensor of the model comes from the checkpoint; mmengine loads with strict=False.

    Args:
        model: prepared, or in FP32.
        checkpoint: as it was read.
        source: its name for messages.
        stage: of the model that it holds; what a later stage adds need not be there.

    Returns:
        Names in the checkpoint that the model lacks.

    Raises:
        CheckpointError: if there are none, if some are missing, have another shape or are not finite.
    """
    state = tensors_of(checkpoint, source)
    own = _prefixes(model, LATER[stage])
    expected = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(own)}
    # Fixed tables that a constructor computes, and counters of batches, need not travel.
    added = _prefixes(model, LATER[Stage.PREPARED])
    computed = {
        name
        for name, _ in model.named_buffers()
        if not name.endswith(('running_mean', 'running_var')) and not name.startswith(added)
    }
    missing = sorted(set(expected) - set(state) - computed)
    if missing:
        raise CheckpointError(
            f'{source} is not of this architecture: {len(missing)} of {len(expected)} tensors are missing, such as '
            f'{missing[:3]}; {REMEDY}'
        )
    for name in sorted(set(expected) & set(state)):
        if state[name].shape != expected[name].shape:
            raise CheckpointError(
                f'{source} is not of this architecture: {name} has shape {tuple(state[name].shape)}, the model '
                f'needs {tuple(expected[name].shape)}; {REMEDY}'
            )
        if state[name].is_floating_point() and not bool(torch.isfinite(state[name]).all()):
            raise CheckpointError(f'{source}: {name} holds NaN or infinite values; train or download it again')
    return sorted(name for name in set(state) - set(expected) if not name.startswith(own))


def complete(model: nn.Module, checkpoint: dict[str, Any], stage: Stage = Stage.PREPARED) -> None:
    """Add what later stages bring to a checkpoint: a strict load passes, a lax one logs nothing."""
    state = checkpoint.get('state_dict', checkpoint)
    later = _prefixes(model, LATER[stage])
    for name, tensor in model.state_dict().items():
        if name.startswith(later):
            state.setdefault(name, tensor.detach().clone())


def _prefixes(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> tuple[str, ...]:
    """Prefixes of the tensors of modules of some kinds."""
    return tuple(f'{name}.' for name, module in model.named_modules() if isinstance(module, kinds)) or ('\0',)
