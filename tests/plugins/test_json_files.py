"""JSON that runs leave behind, whole and damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gplq.plugins.json_files import read_json, read_points
from gplq.plugins.results import ResultError

FIELDS = {'step': str, 'minutes': float, 'iteration': int}
POINT = {'step': 'W32A4', 'minutes': 2, 'iteration': 7, 'more': None}


@pytest.mark.parametrize(
    ('text', 'told'),
    [('{', r'a\.json is no JSON: Expecting'), ('[' * 10**5, r'a\.json is no JSON'), (None, r'a\.json cannot be read')],
)
def test_what_is_no_json_is_told_by_name(tmp_path: Path, text: str | None, told: str) -> None:
    if text is not None:
        (tmp_path / 'a.json').write_text(text)
    with pytest.raises(ResultError, match=told):
        read_json(tmp_path / 'a.json')
    with pytest.raises(ResultError, match=f'{told}.*delete it to resume'):
        read_points(tmp_path / 'a.json', FIELDS)


@pytest.mark.parametrize(
    ('content', 'told'),
    [
        ({'step': 'W32A4'}, 'is no list of objects with .*'),
        ([7], 'is no list of objects with .*'),
        ([{'step': 'W32A4', 'minutes': 2.0}], r"is no list of objects with \['iteration', 'minutes', 'step'\]"),
        ([POINT, POINT | {'step': 7}], 'step of entry 1 is 7, no str'),
        ([POINT | {'minutes': 'long'}], "minutes of entry 0 is 'long', no float"),
        ([POINT | {'iteration': 7.5}], 'iteration of entry 0 is 7.5, no int'),
        ([POINT | {'iteration': True}], 'iteration of entry 0 is True, no int'),
    ],
)
def test_points_have_their_fields_and_these_their_types(tmp_path: Path, content: Any, told: str) -> None:
    path = tmp_path / 'a.json'
    path.write_text(json.dumps(content))
    with pytest.raises(ResultError, match=f'{told}; delete it to resume'):
        read_points(path, FIELDS)


def test_points_come_as_they_are(tmp_path: Path) -> None:
    (tmp_path / 'a.json').write_text(json.dumps([POINT, POINT | {'minutes': 2.5}]))
    assert read_points(tmp_path / 'a.json', FIELDS) == [POINT, POINT | {'minutes': 2.5}]
