"""Values against annotations."""

from __future__ import annotations

from typing import Any, Literal

import pytest

import gplq
from gplq.errors import RecipeError
from gplq.typecheck import check_types


@pytest.mark.parametrize(
    ('value', 'kind'),
    [
        (1, int),
        (1, float),
        (0.5, float),
        (False, bool),
        ('a', str),
        ('a', Literal['a', 'b']),
        (None, int | None),
        (2, int | None),
        ((), tuple[int, ...]),
        ((1, 2.0), tuple[float, ...]),
        ((1, 2), tuple[int, int]),
        ({'a': 1}, dict[str, Any]),
        ('a', str | tuple[str, ...]),
    ],
)
def test_fitting_values_pass(value: Any, kind: Any) -> None:
    check_types({'x': value}, {'x': kind})


@pytest.mark.parametrize(
    ('value', 'kind', 'told'),
    [
        (1.0, int, 'an integer, got 1.0'),
        (True, int, 'an integer, got True'),
        (True, float, 'a number, got True'),
        ('1', float, "a number, got '1'"),
        (1, bool, 'True or False, got 1'),
        (None, str, 'a string, got None'),
        ([1], Literal['a', 'b'], r"one of \['a', 'b'\], got \[1\]"),
        ('1', int | None, "an integer or None, got '1'"),
        ([1], tuple[int, ...], r'a list \(an integer each\), got \[1\]'),
        ((1, 'a'), tuple[int, ...], r"a list \(an integer each\), got \(1, 'a'\)"),
        ((1, 2, 3), tuple[int, int], r'a list of 2 \(an integer each\), got \(1, 2, 3\)'),
        ('a', dict[str, Any], "a dict, got 'a'"),
        ('a', gplq.Recipe, "a Recipe, got 'a'"),
    ],
)
def test_other_values_are_refused_in_words(value: Any, kind: Any, told: str) -> None:
    with pytest.raises(RecipeError, match=f'^stage.x must be {told}$'):
        check_types({'x': value}, {'x': kind}, 'stage.')
