"""Packed codes: bytes by hand, round trips at every width."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gplq.errors import CheckpointError
from gplq.packing import pack, packed_bytes, unpack


def test_two_four_bit_values_share_a_byte() -> None:
    # 1 in the low half, 7 in the high one; -1 is 1111 in two's complement.
    assert pack(torch.tensor([1, 7, -1]), 4, signed=True).tolist() == [0x71, 0x0F]


def test_three_bits_cross_bytes() -> None:
    # 001, 010, 011 from the lowest bit: 1 + (2 << 3) + ((3 & 3) << 6), the third's high bit falls into the next byte.
    assert pack(torch.tensor([1, 2, 3]), 3, signed=False).tolist() == [1 + 16 + 192, 0]


@pytest.mark.parametrize(('count', 'bits', 'expected'), [(0, 4, 0), (1, 2, 1), (3, 4, 2), (8, 3, 3), (9, 8, 9)])
def test_packed_bytes(count: int, bits: int, expected: int) -> None:
    assert packed_bytes(count, bits) == expected
    assert len(pack(torch.zeros(count), bits, signed=True)) == expected


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 8), st.booleans(), st.data())
def test_round_trip(bits: int, signed: bool, data: st.DataObject) -> None:
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    values = data.draw(st.lists(st.integers(low, high), max_size=40))
    codes = torch.tensor(values, dtype=torch.int64)
    packed = pack(codes.float(), bits, signed=signed)
    assert packed.dtype == torch.uint8
    assert unpack(packed, len(values), bits, signed=signed).tolist() == values


@pytest.mark.parametrize('bits', range(2, 9))
def test_every_code_of_every_width(bits: int) -> None:
    codes = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1))
    assert torch.equal(unpack(pack(codes, bits, signed=True), len(codes), bits, signed=True), codes)


@pytest.mark.parametrize('data', [torch.zeros(1, dtype=torch.uint8), torch.zeros(2, dtype=torch.int8)])
def test_bytes_that_do_not_fit_are_refused(data: torch.Tensor) -> None:
    with pytest.raises(CheckpointError, match='damaged'):
        unpack(data, 4, 4, signed=True)
