"""Engines take turns on one model, so that a slow minute of the machine falls on all of them alike."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from tersor.peers.source import Inputs, Source
from tersor.peers.worker import EngineError, Worker

TIMED_PER_TURN = 3
SLOW_MILLISECONDS = 5000.0
"""An engine whose second call takes longer is timed by that one call: more would not change the picture."""


@dataclass
class Measurement:
    """What one engine did.

    `error` is the largest difference to the reference engine's first output, relative to its largest value, and
    `cosine` the cosine to that output; `idle_load` the most that the process used of one core while it was not its
    turn.
    """

    engine: str
    version: str = ""
    load_seconds: float | None = None
    milliseconds: list[float] = field(default_factory=list)
    error: float | None = None
    cosine: float | None = None
    idle_load: float = 0.0
    failure: str | None = None

    @property
    def minimum(self) -> float | None:
        """Shortest call in milliseconds; None when there was none."""
        return min(self.milliseconds, default=None)

    @property
    def median(self) -> float | None:
        """Median call in milliseconds; None when there was none."""
        return statistics.median(self.milliseconds) if self.milliseconds else None


def race(
    workers: Mapping[str, Worker],
    source: Source,
    inputs: Inputs,
    *,
    reference: str = "torch",
    calls: int = 21,
) -> list[Measurement]:
    """At least `calls` timed calls of each engine, in turns (one untimed, three timed) of rotating order.

    Outputs are compared with those of the engine called `reference`, where it takes part. An engine that
    fails says so in its measurement.
    """
    found = {name: Measurement(name) for name in workers}
    running, expected = [], None
    for name in sorted(workers, key=lambda name: name != reference):
        worker, result = workers[name], found[name]
        try:
            result.load_seconds, result.version = worker.load(source, inputs)
            # The first call may allocate or compile; the second tells whether the engine is slow.
            second = worker.turn(1, 1).milliseconds
            if second[0] > SLOW_MILLISECONDS:
                result.milliseconds = second
            else:
                running.append(name)
            output = worker.output()
        except EngineError as error:
            result.failure = str(error)
            continue
        expected = output if name == reference else expected
        if expected is not None:
            result.error = _relative_error(output, expected)
            result.cosine = _cosine(output, expected)
    rounds = -(-calls // TIMED_PER_TURN)
    for number in range(rounds):
        shift = number % max(1, len(running))
        for name in running[shift:] + running[:shift]:
            try:
                turn = workers[name].turn(1, TIMED_PER_TURN)
            except EngineError as error:
                found[name].failure = str(error)
                continue
            found[name].milliseconds += turn.milliseconds
            if number:  # before the first round the others were loading
                found[name].idle_load = max(found[name].idle_load, turn.idle_load)
    return list(found.values())


def _relative_error(output: np.ndarray, expected: np.ndarray) -> float:
    if output.shape != expected.shape:
        return float("inf")
    return float(np.abs(output - expected).max() / np.abs(expected).max())


def _cosine(output: np.ndarray, expected: np.ndarray) -> float:
    if output.shape != expected.shape:
        return 0.0
    a, b = (value.astype(np.float64).ravel() for value in (output, expected))
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))
