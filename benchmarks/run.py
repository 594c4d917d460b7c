"""Latency of Tersor and its peers, measured side by side.

For every model, shape and number of threads each engine runs in its own process, bound to that many CPUs. They take
turns, in an order that rotates every round; a turn is one untimed call and three timed ones. Reported are the minimum and
the median of at least 20 timed calls, and for each peer its median divided by ours. Outputs are compared with torch eager.
"""

from __future__ import annotations

import argparse
import datetime
import os
import shlex
import sys
from pathlib import Path

import numpy as np

from benchmarks.models import MODELS, Model
from benchmarks.report import US, Entry, Measurement, Report, machine
from benchmarks.worker import EngineError, Worker

RESULTS = Path(__file__).resolve().parent / "results"
REFERENCE = "torch"
TIMED_PER_TURN = 3
SLOW_MILLISECONDS = 5000.0
"""An engine whose first call takes longer is timed by that one call: waiting for more would not change the picture."""


def measure(model: Model, batch: int, length: int, threads: int, workers: dict[str, Worker], calls: int,
            versions: dict[str, str]) -> Entry:
    """Let the engines take turns on one entry until each has `calls` timed calls."""
    found = {engine: Measurement(engine) for engine in workers}
    reference: np.ndarray | None = None
    running = []
    for engine in sorted(workers, key=lambda name: name != REFERENCE):
        result = found[engine]
        try:
            result.load_seconds, versions[engine] = workers[engine].load(model.name, batch, length)
            first = workers[engine].turn(0, 1).milliseconds
            output = workers[engine].output()
        except EngineError as error:
            result.failure = str(error)
            continue
        if engine == REFERENCE:
            reference = output
        if reference is not None:
            result.error = float(np.abs(output - reference).max() / np.abs(reference).max())
        if first[0] > SLOW_MILLISECONDS:
            result.milliseconds = first
        else:
            running.append(engine)
    rounds = -(-calls // TIMED_PER_TURN)
    for turn in range(rounds):
        shift = turn % max(1, len(running))
        for engine in running[shift:] + running[:shift]:
            result = found[engine]
            if result.failure:
                continue
            try:
                answer = workers[engine].turn(1, TIMED_PER_TURN)
            except EngineError as error:
                result.failure = str(error)
                continue
            result.milliseconds += answer.milliseconds
            result.idle_load = max(result.idle_load, answer.idle_load if turn else 0.0)
    return Entry(model.name, model.label(batch, length), threads, list(found.values()))


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    command = shlex.join(["python", "-m", "benchmarks.run", *(sys.argv[1:] if arguments is None else arguments)])
    now = datetime.datetime.now()
    report = Report(now.strftime("%Y-%m-%d %H:%M"), command, machine(), {})
    for threads in options.threads:
        workers = {engine: Worker(engine, threads) for engine in options.engines}
        try:
            for name in options.models:
                model = MODELS[name]
                for batch, length in (options.shapes if options.shapes and not model.image else model.shapes):
                    entry = measure(model, batch, length, threads, workers, options.calls, report.versions)
                    report.entries.append(entry)
                    print(line(entry), flush=True)
        finally:
            for worker in workers.values():
                worker.stop()
    for path in report.write(options.output, now.strftime("%Y-%m-%d-%H%M")):
        print(f"wrote {path}")
    return 0


def line(entry: Entry) -> str:
    """One entry on one line, for following a run."""
    parts = []
    for m in entry.measurements:
        if m.median is None:
            parts.append(f"{m.engine} failed: {m.failure}")
            continue
        ratio = entry.ratio(m.engine) if m.engine != US else None
        wrong = f" error {m.error:.1e}" if m.error is not None and m.error > 1e-4 else ""
        parts.append(f"{m.engine} {m.median:.3g} ({m.minimum:.3g}){f' [{ratio:.2f}]' if ratio else ''}{wrong}")
    return f"{entry.model} {entry.shape} {entry.threads} thr: " + "; ".join(parts)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    from benchmarks.engines import ENGINES

    def listed(choices: list[str]):
        def convert(text: str) -> list[str]:
            values = text.split(",")
            wrong = [value for value in values if value not in choices]
            if wrong:
                raise argparse.ArgumentTypeError(f"{', '.join(wrong)}: choose from {', '.join(choices)}")
            return values

        return convert

    def shapes(text: str) -> list[tuple[int, int]]:
        try:
            return [tuple(map(int, shape.split("x", 1))) for shape in text.split(",")]
        except ValueError as error:
            raise argparse.ArgumentTypeError("shapes are BATCHxLENGTH, e.g. 1x16,8x128") from error

    cpus = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("--models", type=listed(list(MODELS)), default=list(MODELS), help=", ".join(MODELS))
    parser.add_argument("--shapes", type=shapes, help="BATCHxLENGTH,... instead of each text model's own list")
    parser.add_argument("--threads", type=lambda text: [int(n) for n in text.split(",")], default=[1, 2],
                        help="numbers of threads, e.g. 1,2")
    parser.add_argument("--engines", type=listed(list(ENGINES)), default=[e for e in ENGINES if e != "tvm"],
                        help=f"{', '.join(ENGINES)}; all but tvm (20 s a call on BERT-base) by default")
    parser.add_argument("--calls", type=int, default=21, help="timed calls of each engine on each entry")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON and Markdown files")
    options = parser.parse_args(arguments)
    options.threads = [n for n in options.threads if 1 <= n <= cpus] or parser.error(f"this process has {cpus} CPUs")
    return options


if __name__ == "__main__":
    sys.exit(main())
