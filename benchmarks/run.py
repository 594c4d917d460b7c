"""Latency of Tersor and its peers, measured side by side.

For every model, shape and number of threads each engine runs in its own process, bound to that many
CPUs. They take turns, in an order that rotates every round; a turn is one untimed call and three timed
ones. Reported are the median and the minimum of at least 20 timed calls, and for each peer its median
divided by ours. Outputs are compared with torch eager in float32. With --recipe ours is compiled with that
recipe, and the peers compute at the same precision; int8 is calibrated with random data, which proves speed only.
"""

from __future__ import annotations

import argparse
import datetime
import os
import shlex
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks.engines import AS_C, BESIDE, OTHERS, RECIPES, engines
from benchmarks.floor import Floor
from benchmarks.models import MODELS
from benchmarks.report import Entry, Report, line, machine
from tersor.peers import US, Worker, race

RESULTS = Path(__file__).resolve().parent / "results"


def main(arguments: list[str] | None = None) -> int:
    """Measure what the command line asks for; print each entry as it is done and write the report."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    now = datetime.datetime.now()
    command = shlex.join(["python", "-m", "benchmarks.run", *arguments])
    report = Report(now.strftime("%Y-%m-%d %H:%M"), command, machine(), options.recipe)
    known, floor = engines(options.recipe), Floor(options.recipe)
    for threads in options.threads:
        workers = {engine: Worker(known[engine], threads) for engine in options.engines}
        try:
            for name in options.models:
                model = MODELS[name]
                for batch, length in options.shapes if options.shapes and not model.image else model.shapes:
                    inputs = model.inputs(batch, length)
                    measurements = race(workers, model, inputs, calls=options.calls)
                    limit = floor.milliseconds(model, inputs, threads)
                    entry = Entry(name, model.label(batch, length), threads, measurements, limit)
                    report.entries.append(entry)
                    print(line(entry), flush=True)
        finally:
            for worker in workers.values():
                worker.stop()
    for path in report.write(options.output, now.strftime("%Y-%m-%d-%H%M%S")):
        print(f"wrote {path}")
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options; argparse ends the process when they are wrong."""
    cpus = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--recipe", choices=list(RECIPES), default="fp32", help="default: fp32")
    parser.add_argument(
        "--models", type=several(MODELS), default=list(MODELS), help=f"of {','.join(MODELS)}; default: all"
    )
    parser.add_argument(
        "--shapes",
        type=shapes,
        help="BATCHxLENGTH,... instead of each text model's own list, e.g. 1x16,8x128",
    )
    parser.add_argument("--threads", type=several(map(str, range(1, cpus + 1))), default=["1", "2"][:cpus])
    parser.add_argument(
        "--engines",
        type=several((US, AS_C, *OTHERS)),
        help=f"of {','.join((US, AS_C, *OTHERS))}; default: those of the recipe's precision, tvm left out (20 s a"
        f" call), and {AS_C}, our C export",
    )
    parser.add_argument("--calls", type=int, default=21, help="timed calls of each engine on each entry")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON and Markdown files")
    options = parser.parse_args(arguments)
    options.engines = options.engines or [US, *BESIDE[options.recipe]]
    options.threads = [int(number) for number in options.threads]
    return options


def several(choices: Iterable[str]) -> Callable[[str], list[str]]:
    """A converter of comma-separated names to a list."""
    choices = list(choices)

    def convert(text: str) -> list[str]:
        values = text.split(",")
        wrong = [value for value in values if value not in choices]
        if wrong:
            raise argparse.ArgumentTypeError(f"{', '.join(wrong)}: choose from {', '.join(choices)}")
        return values

    return convert


def shapes(text: str) -> list[tuple[int, int]]:
    """`1x16,8x128` -> [(1, 16), (8, 128)]."""
    try:
        return [(int(batch), int(length)) for batch, length in (s.split("x") for s in text.split(","))]
    except ValueError as error:
        raise argparse.ArgumentTypeError("shapes are BATCHxLENGTH, e.g. 1x16,8x128") from error


if __name__ == "__main__":
    sys.exit(main())
