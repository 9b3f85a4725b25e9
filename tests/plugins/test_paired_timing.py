from __future__ import annotations

from gplq.plugins.paired_timing import WARM_UP, time_in_turn


def test_rivals_take_turns_and_the_first_rounds_are_not_kept() -> None:
    said: list[tuple[str, int]] = []
    rivals = {name: lambda value, name=name: said.append((name, value)) for name in ('a', 'b')}
    seconds = time_in_turn(rivals, range(WARM_UP + 2))
    assert said == [('b', 0), ('a', 0), ('a', 1), ('b', 1), ('b', 2), ('a', 2), ('a', 3), ('b', 3)]
    assert {name: len(times) for name, times in seconds.items()} == {'a': 2, 'b': 2}
    assert all(time >= 0 for times in seconds.values() for time in times)
