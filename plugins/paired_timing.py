"""Wall-clock times of rivals that take turns, so that a machine's moods meet all of them."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = ['WARM_UP', 'time_in_turn']

# First inputs, whose times are not kept.
WARM_UP = 2


def time_in_turn(rivals: Mapping[str, Callable[[Any], object]], inputs: Sequence[Any]) -> dict[str, list[float]]:
    """Seconds that each rival takes for each input but the first `WARM_UP`; who begins changes from one to the next."""
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    for number, value in enumerate(inputs):
        for name in sorted(rivals, reverse=number % 2 == 0):
            start = time.perf_counter()
            rivals[name](value)
            if number >= WARM_UP:
                seconds[name].append(time.perf_counter() - start)
    return seconds
