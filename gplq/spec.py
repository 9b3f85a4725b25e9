"""What a quantizer does, as data: bits, sign, granularity, offset, scheme."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from gplq.errors import RecipeError

__all__ = ['FLOAT_BITS', 'MAX_BITS', 'MIN_BITS', 'Granularity', 'QuantizerSpec', 'Scheme', 'check_bits']

Granularity = Literal['tensor', 'channel', 'head']
Scheme = Literal['uniform', 'row', 'column', 'twin_uniform', 'log_sqrt2']

MIN_BITS, MAX_BITS = 2, 8
FLOAT_BITS = 32


def check_bits(bits: int, what: str, *, allow_float: bool = False) -> int:
    """Return ``bits`` if it is 2 to 8 (or 32, floating point, where allowed).

    Raises:
        RecipeError: for any other value.
    """
    if isinstance(bits, bool) or not isinstance(bits, int):
        raise RecipeError(f'{what} must be an integer, got {bits!r}')
    if MIN_BITS <= bits <= MAX_BITS or (allow_float and bits == FLOAT_BITS):
        return bits
    also = f', or {FLOAT_BITS} for floating point' if allow_float else ''
    raise RecipeError(f'{what}={bits} is not supported: choose {MIN_BITS} to {MAX_BITS}{also}')


@dataclass(frozen=True)
class QuantizerSpec:
    """Settings of one quantizer.

    ``signed=None`` leaves the sign to calibration: unsigned where no negative value was seen.
    ``scheme`` is that of :mod:`gplq.row_quantizer`, :mod:`gplq.twin_uniform` or :mod:`gplq.log_sqrt2` where it is not
    uniform.
    With ``offset`` the represented values are ``scale * (code + offset)``, else ``scale * code``.
    """

    bits: int
    signed: bool | None = True
    granularity: Granularity = 'tensor'
    offset: bool = False
    scheme: Scheme = 'uniform'

    def __post_init__(self) -> None:
        check_bits(self.bits, 'bits')
        if self.granularity not in get_args(Granularity):
            raise RecipeError(f'granularity {self.granularity!r} is not one of {get_args(Granularity)}')
        if self.scheme not in get_args(Scheme):
            raise RecipeError(f'scheme {self.scheme!r} is not one of {get_args(Scheme)}')
        if self.scheme != 'uniform' and (self.offset or self.granularity == 'channel'):
            raise RecipeError(f'scheme {self.scheme!r} has no offset, and one scale a tensor or a head')

    @property
    def qmin(self) -> int:
        """Smallest code of activations; an undecided sign counts as signed.

        Of 8 bits it is -127: around a zero point of 128 an engine may multiply by signed bytes, and cut sums off.
        """
        return self.lowest + (self.signed is not False and self.bits == 8)

    @property
    def lowest(self) -> int:
        """Smallest code that the bits hold, which weights have."""
        return 0 if self.signed is False else -int(2 ** (self.bits - 1))

    @property
    def qmax(self) -> int:
        """Largest code."""
        return int(2**self.bits if self.signed is False else 2 ** (self.bits - 1)) - 1

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields."""
        return asdict(self)
