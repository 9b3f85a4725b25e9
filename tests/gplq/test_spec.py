"""The codes that a quantizer of so many bits has."""

from __future__ import annotations

import pytest

from gplq.spec import QuantizerSpec


@pytest.mark.parametrize(
    ('bits', 'signed', 'codes', 'lowest'),
    [(2, True, (-2, 1), -2), (4, True, (-8, 7), -8), (4, False, (0, 15), 0), (8, False, (0, 255), 0)],
)
def test_codes(bits: int, signed: bool, codes: tuple[int, int], lowest: int) -> None:
    spec = QuantizerSpec(bits, signed=signed)
    assert (spec.qmin, spec.qmax) == codes and spec.lowest == lowest


def test_signed_bytes_of_activations_are_symmetric() -> None:
    """A zero point of 128 lets an engine make signed bytes of them; weights have all 256 codes."""
    spec = QuantizerSpec(8, signed=True)
    assert (spec.qmin, spec.qmax, spec.lowest) == (-127, 127, -128)
