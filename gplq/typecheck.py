"""Check settings against the annotations of the dataclass that they are for."""

from __future__ import annotations

from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from gplq.errors import RecipeError

__all__ = ['check_types']

_WORDS = {int: 'an integer', float: 'a number', bool: 'True or False', str: 'a string', NoneType: 'None'}


def check_types(values: Mapping[str, Any], types: Mapping[str, Any], place: str = '') -> None:
    """Refuse the first value that is not of its type.

    Args:
        values: settings by name; each has a type.
        types: as ``typing.get_type_hints`` gives them: numbers, strings, ``bool``, ``None``, ``Literal``, mappings,
            tuples and unions of these. An integer is a number, ``True`` is neither.
        place: precedes the names in the message, such as ``'stage.'``.

    Raises:
        RecipeError: naming the setting, what it must be and what it is.
    """
    for name, value in values.items():
        if not _fits(value, types[name]):
            raise RecipeError(f'{place}{name} must be {_words(types[name])}, got {value!r}')


def _fits(value: Any, kind: Any) -> bool:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in arguments)
    if origin is Literal:
        return value in arguments
    if origin is tuple and isinstance(value, tuple):
        if arguments[-1] is ...:
            return all(_fits(item, arguments[0]) for item in value)
        return len(value) == len(arguments) and all(map(_fits, value, arguments))
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else origin or kind)


def _words(kind: Any) -> str:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return ' or '.join(_words(one) for one in arguments)
    if origin is Literal:
        return f'one of {list(arguments)}'
    if origin is tuple:
        number = '' if arguments[-1] is ... else f' of {len(arguments)}'
        return f'a list{number} ({_words(arguments[0])} each)'
    if isinstance(origin, type):
        return f'a {origin.__name__}'
    return _WORDS.get(kind) or f'a {kind.__name__}'
