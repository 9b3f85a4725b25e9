"""Name patterns choose modules, and one that chooses nothing is an error."""

from __future__ import annotations

import pytest

from gplq.errors import TargetError
from gplq.targets import match_names

NAMES = ['backbone.blocks.0.qkv', 'backbone.blocks.1.qkv', 'backbone.head', 'neck.conv']


@pytest.mark.parametrize(
    ('patterns', 'expected'),
    [
        (('*',), NAMES),
        (('backbone',), NAMES[:3]),
        (('backbone.blocks.0',), NAMES[:1]),
        (('*.qkv', 'neck'), [NAMES[0], NAMES[1], NAMES[3]]),
        (('backbone.blocks.[01]',), NAMES[:2]),
    ],
)
def test_patterns(patterns: tuple[str, ...], expected: list[str]) -> None:
    assert match_names(NAMES, patterns, 'targets') == frozenset(expected)


def test_a_prefix_of_a_name_is_no_parent() -> None:
    with pytest.raises(TargetError):
        match_names(NAMES, ('back',), 'targets')


def test_unmatched_pattern_is_named_with_what_is_close() -> None:
    with pytest.raises(TargetError, match=r"skip pattern 'backbone\.haed' matches nothing.*backbone\.head"):
        match_names(NAMES, ('*', 'backbone.haed'), 'skip')


def test_no_module_at_all() -> None:
    with pytest.raises(TargetError, match='matches nothing'):
        match_names([], ('*',), 'targets')
