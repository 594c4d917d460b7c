"""How long a compiled kernel takes when its arguments are not in cache."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


def seconds_per_call(call: Callable[..., Any], copies: Sequence[Sequence[Any]], seconds: float) -> float:
    """Calls walk over copies of the arguments for about ``seconds``, every copy at least once.

    A copy counts with its best time, so that other work on the machine is not measured; the result is the mean
    over the copies.
    """
    best, end = np.full(len(copies), np.inf), time.perf_counter() + seconds
    while True:
        for i, arguments in enumerate(copies):
            start = time.perf_counter()
            call(*arguments)
            best[i] = min(best[i], time.perf_counter() - start)
        if time.perf_counter() > end:
            return float(best.mean())
