"""Checkpoints that a run starts from: readable, harmless, of this architecture, loaded at all."""

from __future__ import annotations

from typing import Any

import torch
from mmengine.runner import Runner
from torch import nn

from gplq.errors import CheckpointError
from gplq.layers import LinearCompensation, LinearMap
from gplq.plugins.checkpoint_file import REMEDY, check_depth, parameter_names, read_checkpoint, tensors_of
from gplq.products import QuantizedProduct
from gplq.record import Stage
from gplq.weights import WeightQuantizer

__all__ = ['check_keys', 'check_source', 'complete', 'load_weights']

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
        CheckpointError: if there are none, if some are missing, have another shape or are not finite, or are a deeper
            model's.
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
    check_depth(parameter_names(model), state, source)
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
