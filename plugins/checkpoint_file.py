"""Files of checkpoints: read without executing anything in them, and written alike for the same weights."""

from __future__ import annotations

import pickle
import re
import textwrap
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gplq.errors import CheckpointError
from gplq.files import write_atomically
from gplq.plugins.safe_load import allow_mmengine_objects

__all__ = [
    'REMEDY',
    'check_depth',
    'parameter_names',
    'quantization_of',
    'read_checkpoint',
    'tensors_beyond',
    'tensors_of',
    'write_checkpoint',
]

REMEDY = "give a checkpoint of this config's model, in training by load_from (--cfg-options load_from=PATH)"

# Of a block or layer in the name of a parameter.
_NUMBER = re.compile(r'(?<=\.)\d+(?=\.)|^\d+(?=\.)')
# How torch's restricted unpickler names what it refuses.
_FOREIGN = re.compile(r'GLOBAL:? ([\w.]+)')


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
        # What an unpickler says of bytes that nobody vouches for can be any error; it also advises to unpickle all.
        told = str(error)
        if isinstance(error, pickle.UnpicklingError) and 'Unsupported operand' not in told:
            found = _FOREIGN.search(told)
            raise CheckpointError(
                f'checkpoint {path} holds objects that are not data{f", such as {found[1]}," if found else ""} and was '
                'not read; save it anew with nothing but its state_dict'
            ) from None
        reason = textwrap.shorten(told.partition('\n')[0], 120, placeholder=' …')
        raise CheckpointError(
            f'checkpoint {path} cannot be read, it may be truncated or not written by torch.save: copy or download it '
            f'anew ({type(error).__name__}: {reason})'
        ) from None
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f'checkpoint {path} holds a {type(checkpoint).__name__}, not a state dict')
    return checkpoint


def write_checkpoint(path: str | Path, content: dict[str, Any]) -> None:
    """Write a checkpoint in one step; a program that is run again writes the same bytes.

    Results know a checkpoint by their hash. ``torch.save`` puts the name of a file into them, but not into an open one.

    Raises:
        WriteError: if it cannot be written; what was there before stays.
    """

    def write(temporary: str) -> None:
        with open(temporary, 'wb') as file:
            torch.save(content, file)

    write_atomically(path, write)


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


def parameter_names(model: nn.Module) -> set[str]:
    """Of a state dict's tensors those that are parameters, under each of its names where layers share one."""
    return {name for name, _ in model.named_parameters(remove_duplicate=False)}


def tensors_beyond(own: Collection[str], state: Collection[str]) -> list[str]:
    """Names in ``state`` of blocks or layers, by their numbers, beyond those of a model with parameters ``own``."""
    series = {_NUMBER.sub('#', name) for name in own}
    return sorted(name for name in state if name not in own and _NUMBER.sub('#', name) in series)


def check_depth(own: Collection[str], state: Collection[str], source: str) -> None:
    """Refuse a deeper model's tensors, of which the first blocks would be taken for the whole.

    Args:
        own: names of the parameters of the model that they are for.
        state: names of tensors, as the model calls them.
        source: where they are from.

    Raises:
        CheckpointError: if there are blocks or layers, by their numbers, beyond the model's own.
    """
    beyond = tensors_beyond(own, state)
    if beyond:
        raise CheckpointError(
            f'{source} is of a deeper model: {len(beyond)} of its tensors are of blocks or layers that this one does '
            f'not have, such as {beyond[0]}; {REMEDY}'
        )


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
