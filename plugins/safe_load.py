"""Let torch's restricted unpickler read the checkpoints that mmengine writes."""

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer

__all__ = ['allow_mmengine_objects']


def allow_mmengine_objects() -> None:
    """Allow exactly what mmengine puts beside the tensors, so that its checkpoints can be read back.

    From 2.6 on `torch.load` refuses everything but tensors and plain containers, and with it every checkpoint
    of an mmengine training: the log's history travels in it. The guard itself stays on, and a checkpoint that
    holds any other object is still refused.
    """
    numpy_2 = np.lib.NumpyVersion(np.__version__) >= '2.0.0'
    # numpy 2 moved the functions that rebuild arrays; files name the place of the numpy that wrote them.
    multiarray = importlib.import_module('numpy._core.multiarray' if numpy_2 else 'numpy.core.multiarray')
    rebuild = [
        (function, f'{package}.multiarray.{function.__name__}')
        for function in (multiarray._reconstruct, multiarray.scalar)
        for package in ('numpy._core', 'numpy.core')
    ]
    numbers = {type(np.dtype(code)) for code in np.typecodes['AllInteger'] + np.typecodes['AllFloat'] + '?'}
    torch.serialization.add_safe_globals(
        [HistoryBuffer, np.ndarray, np.dtype, *numbers, *rebuild, (_statistic, 'builtins.getattr')]
    )


def _statistic(owner: Any, name: str) -> Callable:
    """Stand in for the `getattr` by which a HistoryBuffer's pickle names its methods, and do nothing else."""
    if owner is not HistoryBuffer or name not in ('min', 'max', 'mean', 'current'):
        raise ValueError(f'the checkpoint asks for {name!r} of {owner!r}; mmengine did not write it')
    return getattr(HistoryBuffer, name)
