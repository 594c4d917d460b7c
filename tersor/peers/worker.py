"""A process that holds one engine and calls it when told to; asleep on its pipe in between.

One process per engine keeps its threads, allocator and libraries apart from the others'; a pool that goes on
spinning after its turn shows up as processor time used while asleep.
"""

from __future__ import annotations

import importlib
import logging
import multiprocessing
import os
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from tersor.peers.source import Inputs, Source


class EngineError(Exception):
    """An engine failed in its process; the message says how."""


@dataclass(frozen=True)
class Turn:
    """Latencies of one turn, in milliseconds, and the share of one core used since the turn before."""

    milliseconds: list[float]
    idle_load: float


class Worker:
    """The parent's handle on a process that runs `engine` ("module:Class") on the first `threads` CPUs."""

    def __init__(self, engine: str, threads: int):
        context = multiprocessing.get_context("spawn")
        self._pipe, child = context.Pipe()
        self._process = context.Process(target=_serve, args=(child, engine, threads), daemon=True)
        with _environment(OMP_NUM_THREADS=str(threads)):
            self._process.start()
        child.close()

    def load(self, source: Source, inputs: Inputs) -> tuple[float, str]:
        """Prepare a model: (seconds it took, the engine's version). EngineError if it cannot."""
        return self._ask("load", source, inputs)

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

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def _ask(self, *request: object) -> Any:
        try:
            self._pipe.send(request)
            failure, answer = self._pipe.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError) as error:
            self._process.join(timeout=5)
            code = self._process.exitcode
            raise EngineError(f"its process ended with exit code {code}") from error
        if failure:
            raise EngineError(failure)
        return answer


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Environment variables for processes that start meanwhile: what OpenMP reads as early as with their main module,
    which may import torch. More threads than CPUs would spin on each other's time."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _serve(pipe: Connection, name: str, threads: int) -> None:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)

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
                call = None  # the old model must not wait for the new one in memory
                start = time.perf_counter()
                engine = engine or _engine(name)(threads)
                call = engine.load(*arguments)
                answer: Any = (time.perf_counter() - start, engine.version)
            elif request == "turn":
                untimed, timed = arguments
                for _ in range(untimed):
                    call()
                answer = ([_milliseconds(call) for _ in range(timed)], used / elapsed)
            else:
                answer = np.array(call())
            pipe.send((None, answer))
        except Exception:
            pipe.send((" ".join(traceback.format_exc(limit=0).split()), None))
        slept = (time.perf_counter(), time.process_time())


def _engine(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _milliseconds(call: Any) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3
