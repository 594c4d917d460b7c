"""A process that holds one engine and calls it when told to; asleep on its pipe in between.

One process per engine keeps its threads, allocator and libraries apart from the others', and a pool that goes on spinning
after its turn shows up as processor time used while asleep.
"""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from benchmarks.models import MODELS

CACHE = Path(__file__).resolve().parents[1] / ".cache" / "benchmarks"


class EngineError(Exception):
    """An engine failed in its process; the message is its traceback's last lines."""


@dataclass(frozen=True)
class Turn:
    """Latencies in milliseconds of one turn, and the share of one core used since the turn before."""

    milliseconds: list[float]
    idle_load: float


class Worker:
    """The parent's handle on a worker process, started with `threads` CPUs of this process's affinity."""

    def __init__(self, engine: str, threads: int):
        context = multiprocessing.get_context("spawn")
        self._pipe, child = context.Pipe()
        self._process = context.Process(target=_serve, args=(child, engine, threads), daemon=True)
        self._process.start()
        child.close()

    def load(self, model: str, batch: int, length: int) -> tuple[float, str]:
        """Prepare a model for a shape: (seconds it took, the engine's version). EngineError if it cannot."""
        return self._ask("load", model, batch, length)

    def turn(self, untimed: int, timed: int) -> Turn:
        """Call the loaded model `untimed` + `timed` times."""
        return Turn(*self._ask("turn", untimed, timed))

    def output(self) -> np.ndarray:
        """The first output of one call."""
        return self._ask("output")

    def stop(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _ask(self, *request: object):
        try:
            self._pipe.send(request)
            failure, answer = self._pipe.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError) as error:
            self._process.join(timeout=5)
            raise EngineError(f"the process ended with exit code {self._process.exitcode}") from error
        if failure:
            raise EngineError(failure)
        return answer


def _serve(pipe: Connection, name: str, threads: int) -> None:
    # Before anything that starts threads is imported.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    os.environ["OMP_NUM_THREADS"] = str(threads)
    from benchmarks.engines import ENGINES

    engine = call = None
    slept = (time.perf_counter(), time.process_time())
    while True:
        try:
            request, *arguments = pipe.recv()
        except EOFError:
            return
        elapsed, used = time.perf_counter() - slept[0], time.process_time() - slept[1]
        try:
            if request == "load":
                model, batch, length = arguments
                call = None
                start = time.perf_counter()
                engine = engine or ENGINES[name](threads, CACHE)
                call = engine.load(MODELS[model], MODELS[model].inputs(batch, length))
                answer = (time.perf_counter() - start, engine.version)
            elif request == "turn":
                untimed, timed = arguments
                for _ in range(untimed):
                    call()
                milliseconds = []
                for _ in range(timed):
                    start = time.perf_counter()
                    call()
                    milliseconds.append((time.perf_counter() - start) * 1e3)
                answer = (milliseconds, used / elapsed if elapsed > 1e-3 else 0.0)
            else:
                answer = np.array(call())
            pipe.send((None, answer))
        except Exception:
            pipe.send((" ".join(traceback.format_exc().strip().splitlines()[-3:]), None))
        slept = (time.perf_counter(), time.process_time())
