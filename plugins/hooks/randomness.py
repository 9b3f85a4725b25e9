"""Random numbers that depend on nothing but what they are for."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

__all__ = ['random_states_kept', 'seed_all', 'seeded']


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Put back the states of torch, numpy and Python afterwards.

    Whoever reads a data loader draws a number. Training then sees the same augmentations and samples with
    quantizers and without, which the FP32 control relies on.
    """
    numpy_state, python_state = np.random.get_state(), random.getstate()
    # Not merely available: a forked worker of the data loader must not touch the GPU that its parent has opened.
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)


def seed_all(*entropy: int) -> None:
    """Seed Python, numpy and torch from numbers; runs that differ in one of them share nothing."""
    state = np.random.SeedSequence(entropy).generate_state(4)
    random.seed(int(state[0]))
    np.random.seed(state[1])
    torch.manual_seed(int(state[2]) << 32 | int(state[3]))


@contextmanager
def seeded(*entropy: int) -> Iterator[None]:
    """Draw from these seeds, and put the states back afterwards."""
    with random_states_kept():
        seed_all(*entropy)
        yield
