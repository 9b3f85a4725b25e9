"""Random states that calibration and validation must not move."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

__all__ = ['random_states_kept']


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Put back the states of torch, numpy and Python afterwards.

    Whoever reads a data loader draws a number. Training then sees the same augmentations and samples with
    quantizers and without, which the FP32 control relies on.
    """
    numpy_state, python_state = np.random.get_state(), random.getstate()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)
