"""The command: runs cases of one part, follows them, writes the summary."""

from __future__ import annotations

import argparse
import datetime
import shlex
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from benchmarks.fuzz.case import BAD, GOOD
from benchmarks.fuzz.journal import Journal, default_path
from benchmarks.fuzz.summary import Summary, replay
from benchmarks.fuzz.worker import Result, Worker
from benchmarks.report import machine

PARTS = {
    "graphs": "benchmarks.fuzz.graphs:Graphs",
    "soups": "benchmarks.fuzz.soups:Soups",
    "files": "benchmarks.fuzz.files:Files",
}
RESULTS = Path(__file__).resolve().parents[1] / "results"


def main(arguments: list[str] | None = None) -> int:
    """Runs what the command line asks for; 1 when a defect was found."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    console = Console()
    journal = Journal(options.journal or default_path(options.part))
    seeds = range(options.seed, options.seed + options.count)
    if options.count == 1:
        journal.results.clear()  # a replay
    results = _run(options.part, seeds, journal, options.minutes, console)
    command = shlex.join(["python", "-m", "benchmarks.fuzz", *arguments])
    now = datetime.datetime.now().strftime("%Y-%m-%d %H:%M")
    summary = Summary(options.part, command, now, machine(), results)
    if options.count == 1:
        for result in results:
            console.print(f"{result.outcome.kind} {result.outcome.label}", style="bold", markup=False)
            console.print(result.outcome.detail, markup=False, highlight=False)
    for kind, labels in summary.counts().items():
        if labels:
            named = ", ".join(f"{label} {count}" for label, count in labels.items() if label)
            console.print(
                f"{sum(labels.values()):6} {kind}{f': {named}' if named else ''}",
                markup=False,
                highlight=False,
            )
    if options.output is not None:
        for path in summary.write(options.output):
            console.print(f"wrote {path}")
    return 1 if summary.defects else 0


def _run(part: str, seeds: range, journal: Journal, minutes: float | None, console: Console) -> list[Result]:
    end = time.monotonic() + 60 * minutes if minutes else float("inf")
    worker = Worker(PARTS[part])
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    results = []
    try:
        with Progress(*columns, console=console) as progress:
            task = progress.add_task(part, total=len(seeds))
            for seed in seeds:
                result = journal.results.get(seed)
                if result is None:
                    if time.monotonic() > end:
                        break
                    result = worker.run(seed)
                    journal.add(result)
                    if result.outcome.kind in BAD:
                        what = f"{result.outcome.kind}: {result.outcome.label}; {replay(part, seed)}"
                        progress.console.print(what, markup=False, highlight=False)
                results.append(result)
                good = sum(r.outcome.kind in GOOD for r in results)
                progress.update(
                    task, advance=1, description=f"{part}: {good} good, {len(results) - good} defects"
                )
    except KeyboardInterrupt:
        console.print("stopped; the same command goes on from here")
    finally:
        worker.stop()
    return results


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options; argparse ends the process when they are wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fuzz",
        description=main.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--count", type=int, default=100, help="cases; 1 shows the case")
    parser.add_argument("--seed", type=int, default=0, help="number of the first case; the others follow")
    parser.add_argument("--minutes", type=float, help="no case is started after this")
    parser.add_argument(
        "--output",
        type=Path,
        nargs="?",
        const=RESULTS,
        help="write the summary to this folder (default: results/)",
    )
    parser.add_argument(
        "--journal", type=Path, help="file of finished cases; the default changes with the sources"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
