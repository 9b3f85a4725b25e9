"""A hash tells values, names, types, shapes and descriptions apart, and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gplq.fingerprint import fingerprint

TENSORS = {'a': torch.arange(6.0).reshape(2, 3), 'b': torch.tensor(1, dtype=torch.int64)}


def test_order_and_memory_do_not_matter() -> None:
    turned = {'b': TENSORS['b'], 'a': TENSORS['a'].T.contiguous().T}
    assert not turned['a'].is_contiguous()
    assert fingerprint(turned, 'w4a4') == fingerprint(TENSORS, 'w4a4')


@pytest.mark.parametrize(
    ('name', 'value'),
    [
        ('a', torch.arange(6.0).reshape(3, 2)),
        ('a', torch.arange(6.0).reshape(2, 3).nextafter(torch.tensor(9.0))),
        ('b', torch.tensor(1, dtype=torch.int32)),
        ('c', torch.tensor(1)),
    ],
)
def test_anything_else_does(name: str, value: Tensor) -> None:
    assert fingerprint({**TENSORS, name: value}, 'w4a4') != fingerprint(TENSORS, 'w4a4')
    assert fingerprint(TENSORS, 'w3a3') != fingerprint(TENSORS, 'w4a4')
