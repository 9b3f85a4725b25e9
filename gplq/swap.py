"""Change a module's class in place, so that its name, parameters, hooks and identity stay."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import nn

__all__ = ['swap_class']


class _Swapped:
    """Makes classes that exist only at run time copyable and picklable by naming their parents."""

    _gplq_mixins: tuple[type, ...]
    _gplq_base: type

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _restore, (self._gplq_mixins, self._gplq_base), self.__dict__


def _restore(mixins: tuple[type, ...], base: type) -> object:
    return object.__new__(_combine(mixins, base))


@cache
def _combine(mixins: tuple[type, ...], base: type) -> type:
    members = {'_gplq_mixins': mixins, '_gplq_base': base}
    return type(f'Quantized{base.__name__}', (_Swapped, *mixins, base), members)


def swap_class(module: nn.Module, mixin: type) -> None:
    """Put ``mixin`` in front of the module's class; ``isinstance`` of the old class stays true."""
    if isinstance(module, mixin):
        return
    if isinstance(module, _Swapped):
        module.__class__ = _combine((mixin, *module._gplq_mixins), module._gplq_base)
    else:
        base: type = type(module)
        module.__class__ = _combine((mixin,), base)
