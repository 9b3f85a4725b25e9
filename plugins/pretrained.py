"""Read the weights of a backbone from a detector's or a classifier's checkpoint."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from gplq.errors import CheckpointError
from gplq.plugins.checkpoint_file import quantization_of, read_checkpoint
from gplq.plugins.downloads import download

from .positions import resize_grid, resize_table

__all__ = ['BACKBONE', 'fit_backbone_state', 'inside_backbone', 'read_state_dict']

# Of a detector's or classifier's backbone among its other parts.
BACKBONE = 'backbone.'

# Tokens before those of the image: a class token, none, one for distillation as well, four registers besides.
_PREFIX_TOKENS = (1, 0, 2, 5)


def read_state_dict(path: str) -> dict[str, Tensor]:
    """Read tensors by name from a `.safetensors` or `.pth` file or URL; nothing in it is ever executed.

    Raises:
        CheckpointError: the file is missing, damaged, of a quantized model or holds anything but data.
    """
    file = str(download(path)) if '://' in path else path
    if not Path(file).is_file():
        raise CheckpointError(f'initial weights {path} do not exist; give the path of a .safetensors or .pth file')
    checkpoint = _read_safetensors(file) if file.endswith('.safetensors') else read_checkpoint(file)
    if quantization_of(checkpoint) is not None:
        raise CheckpointError(
            f"{path} holds a quantized model, whose weights are no FP32 model's; give the FP32 checkpoint it was made "
            "from, or to a classifier with frozen=True its .safetensors by init_cfg=dict(type='Quantized')"
        )
    for key in ('state_dict', 'model'):
        if isinstance(checkpoint.get(key), Mapping):
            checkpoint = checkpoint[key]
    state = {name: value for name, value in checkpoint.items() if isinstance(value, Tensor)}
    for name, value in state.items():
        if not isinstance(name, str) or value.layout is not torch.strided or value.is_complex():
            raise CheckpointError(
                f'{path} holds a {value.layout} tensor of {value.dtype} under {name!r}, which is no weight of a model; '
                'save its state_dict'
            )
    return state


def _read_safetensors(path: str) -> dict[str, Any]:
    try:
        return dict(load_file(path))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f'{path} is no whole safetensors file ({error}); copy or download it anew') from None


def inside_backbone(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The backbone's tensors under its own names, where a state has parts; else the state itself."""
    inside = {name.removeprefix(BACKBONE): value for name, value in state.items() if name.startswith(BACKBONE)}
    return inside or state


def fit_backbone_state(backbone: nn.Module, state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Pick the tensors that belong to `backbone`: a leading `backbone.` goes, positions are resized.

    Raises:
        CheckpointError: a parameter other than relative positions is missing or has another shape, as it would when
            `source` holds another architecture.
    """
    state = inside_backbone(state)
    fitted = {}
    grid = getattr(getattr(backbone, 'patch_embed', None), 'grid_size', None)
    for name, wanted in backbone.state_dict().items():
        if name not in state and '.rel_pos_' in name:
            continue
        if name not in state:
            raise CheckpointError(f'{source} has no {name}; is it the checkpoint of another architecture?')
        fitted[name] = _resized(name, state[name], wanted, grid)
        if wanted.is_floating_point() and not fitted[name].is_floating_point():
            raise CheckpointError(f'{source}: {name} holds {fitted[name].dtype}, not numbers in floating point')
        if fitted[name].shape != wanted.shape:
            placed = 'pos' in name or 'attention_bias' in name
            reason = 'such positions cannot be resized' if placed else 'is it the checkpoint of another architecture?'
            raise CheckpointError(
                f'{source}: {name} has shape {tuple(state[name].shape)} and not {tuple(wanted.shape)}; {reason}'
            )
    return fitted


def _resized(name: str, value: Tensor, wanted: Tensor, grid: Sequence[int] | None) -> Tensor:
    """Resize absolute or relative positions to `wanted`'s number; other tensors have no second size.

    Args:
        name: of the tensor.
        value: as it was read; absolute positions lie in a square.
        wanted: the model's own.
        grid: rows and columns of the model's positions, where it knows them; else a square.
    """
    if name.rpartition('.')[2] == 'pos_embed' and value.ndim == wanted.ndim == 3 and value.shape != wanted.shape:
        for tokens in _PREFIX_TOKENS:
            old, side = (math.isqrt(max(tensor.shape[1] - tokens, 0)) for tensor in (value, wanted))
            height, width = grid if grid is not None and grid[0] != grid[1] else (side, side)
            if (old * old + tokens, height * width + tokens) == (value.shape[1], wanted.shape[1]):
                resized = resize_grid(value[:, tokens:].reshape(1, old, old, -1), height, width)
                return torch.cat([value[:, :tokens], resized.flatten(1, 2)], dim=1)
    if name.rpartition('.')[2] == 'pos_embed' and value.ndim == wanted.ndim == 4:
        # Rows and columns before the channels, or behind them.
        if value.shape[-1] == wanted.shape[-1]:
            return resize_grid(value, *wanted.shape[1:3])
        if value.shape[1] == wanted.shape[1]:
            return resize_grid(value.permute(0, 2, 3, 1), *wanted.shape[2:]).permute(0, 3, 1, 2).contiguous()
    if '.rel_pos_' in name and value.ndim == 2:
        return resize_table(value, wanted.shape[0])
    return value
