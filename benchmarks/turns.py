"""Two or more compiled models timed in this process, bound to one CPU, in turns whose order alternates."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any


def take_turns(
    compiled: Mapping[str, Any], inputs: Mapping[str, Any], rounds: int = 10
) -> dict[str, list[float]]:
    """Milliseconds of each timed call, by name; a turn is one untimed call and three timed ones."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    times: dict[str, list[float]] = {name: [] for name in compiled}
    for turn in range(rounds):
        for name in list(compiled)[:: 1 if turn % 2 else -1]:
            compiled[name](**inputs)
            for _ in range(3):
                start = time.perf_counter()
                compiled[name](**inputs)
                times[name].append(1e3 * (time.perf_counter() - start))
    os.sched_setaffinity(0, allowed)
    return times
