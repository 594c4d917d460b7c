"""A process that runs cases one by one, and its keeper, who sees it crash, hang or outgrow its memory.

The keeper sends numbers; the worker answers with the stages it goes through and how the case ended. Whatever happens to
the process is the case's outcome, with the stage it was in, and the next case gets a new process.
"""

from __future__ import annotations

import importlib
import logging
import multiprocessing
import os
import random
import resource
import signal
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.fuzz.case import GOOD, Outcome, judged

PEER = "onnxruntime"
"""A stage of this name runs code that is not ours: what dies there is no defect of ours."""
PATIENCE = 5
"""A worker that sleeps hangs after this many times the limit."""
FRESH = 500
"""Cases after which a worker is replaced."""


@dataclass(frozen=True)
class Result:
    """One finished case: its number, its outcome, seconds, and the bytes it took on top of what the process had."""

    seed: int
    outcome: Outcome
    seconds: float
    memory: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Result:
        return Result(data["seed"], Outcome(**data["outcome"]), data["seconds"], data["memory"])


class Worker:
    """The keeper of a process that runs the cases of a part; starts it when it is needed."""

    def __init__(self, part: str):
        self.part = part  # "module:Class"; only the worker imports it
        self._process: Any = None
        self._pipe: Connection
        self._done = 0
        self._limit = 0.0

    def run(self, seed: int) -> Result:
        """One case, whatever happens to the process."""
        self._ready()
        start, stage, used = time.monotonic(), "starting", self._processor_time()
        self._pipe.send(seed)
        while True:
            if not self._pipe.poll(0.5):
                worked, passed = self._processor_time() - used, time.monotonic() - start
                if worked > self._limit or passed > PATIENCE * self._limit:
                    self.stop()
                    how = f"after {worked:.0f} s of work, {passed:.0f} s in all"
                    return self._ended(seed, Outcome("hung", stage, how), start)
                continue
            try:
                kind, content = self._pipe.recv()
            except (EOFError, OSError):
                self._process.join()
                how = _signal_name(self._process.exitcode)
                self.stop()
                return self._ended(seed, Outcome("crashed", f"{stage}: {how}"), start)
            if kind == "result":
                self._done += 1
                if self._done >= FRESH:
                    self.stop()
                return Result.from_dict(content)
            stage = content

    def _processor_time(self) -> float:
        """Seconds of work that the process has done: on a busy machine less than have passed."""
        with open(f"/proc/{self._process.pid}/stat", encoding="utf-8") as file:
            fields = file.read().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def stop(self) -> None:
        """Ends the process, if there is one."""
        if self._process is not None:
            self._pipe.close()
            self._process.join(timeout=0.2)
            if self._process.is_alive():
                self._process.kill()
                self._process.join()
            self._process, self._done = None, 0

    def _ready(self) -> None:
        if self._process is not None:
            return
        context = multiprocessing.get_context("spawn")
        self._pipe, child = context.Pipe()
        self._process = context.Process(target=_serve, args=(child, self.part), daemon=True)
        self._process.start()
        child.close()
        _, self._limit = self._pipe.recv()

    @staticmethod
    def _ended(seed: int, outcome: Outcome, start: float) -> Result:
        if outcome.label.startswith(PEER):
            outcome = Outcome("unchecked", f"{PEER} {outcome.kind}", outcome.detail)
        return Result(seed, outcome, time.monotonic() - start, 0)


def _signal_name(code: int | None) -> str:
    return signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"


def run_here(part: Any, seed: int, stage: Any = lambda name: None) -> Result:
    """One case in this process; what it takes in memory is bounded by the part's limit."""
    start = time.monotonic()
    with bounded(part.memory):
        before = _reset_peak()
        outcome = judged(part, random.Random(seed), stage)
        taken = max(_status("VmHWM") - before, 0)
    if outcome.kind in GOOD and taken > part.memory:
        outcome = Outcome("memory", f"{taken >> 20} MiB", outcome.detail)
    return Result(seed, outcome, time.monotonic() - start, taken)


class bounded:
    """Inside, the process may map this many more bytes than now; more is a `MemoryError`."""

    def __init__(self, size: int):
        self.size = size

    def __enter__(self) -> None:
        self._before = resource.getrlimit(resource.RLIMIT_AS)
        # twice: address space is reserved ahead of memory, by thread stacks and arenas
        resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + 2 * self.size, self._before[1]))

    def __exit__(self, *error: object) -> None:
        resource.setrlimit(resource.RLIMIT_AS, self._before)


def _status(name: str) -> int:
    """Bytes of memory that this process has (VmRSS), had at most (VmHWM), or has mapped (VmSize)."""
    for line in _status_lines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) << 10
    return 0


def _status_lines() -> Iterator[str]:
    with Path("/proc/self/status").open(encoding="ascii", errors="replace") as file:
        yield from file


def _reset_peak() -> int:
    """Lets the peak start again from now (Linux, proc(5) clear_refs); the memory in use now."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return _status("VmHWM")
    return _status("VmRSS")


def _serve(pipe: Connection, name: str) -> None:
    """The worker's end: numbers in, stages and results out."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    logging.disable(logging.ERROR)
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the keeper ends us
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    module, _, kind = name.partition(":")
    part = getattr(importlib.import_module(module), kind)()
    pipe.send(("limit", part.limit))
    while True:
        try:
            seed = pipe.recv()
        except EOFError:
            return
        result = run_here(part, seed, lambda stage: pipe.send(("stage", stage)))
        pipe.send(("result", result.to_dict()))
