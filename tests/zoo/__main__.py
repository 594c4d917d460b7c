"""``python -m tests.zoo``: every model from both sides, compiled; exit code 1 when one is not as it should."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tests.zoo import ZOO, report
from tests.zoo.check import check

PAGE = Path(__file__).resolve().parents[2] / "docs" / "zoo.md"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.zoo", description="Checks the models of the zoo.")
    parser.add_argument("--only", metavar="NAME", action="append", help="a model; may be given several times")
    parser.add_argument("--torchscript", action="store_true", help="torch's older ONNX exporter too")
    parser.add_argument(
        "--write", action="store_true", help=f"write docs/{PAGE.name}; with --only, these rows"
    )
    options = parser.parse_args(arguments)
    known = {model.name.lower(): model for model in ZOO}
    if unknown := [n for n in options.only or () if n.lower() not in known]:
        parser.error(f"no model called {', '.join(unknown)}; there are {', '.join(m.name for m in ZOO)}")
    models = [known[n.lower()] for n in options.only] if options.only else ZOO
    rows = report.rows(PAGE.read_text(encoding="utf-8")) if options.only and PAGE.exists() else {}
    if options.write and (absent := [m.name for m in ZOO if m not in models and m.name not in rows]):
        parser.error(f"docs/{PAGE.name} has no row to keep for {', '.join(absent)}")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    console, results = Console(), []
    columns = TextColumn("{task.description:24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(models))
        for model in models:
            progress.update(task, description=model.name)
            results.append(check(model, torchscript=options.torchscript))
            progress.advance(task)
    console.print(report.table(results, options.torchscript))
    for result in results:
        for surprise in result.surprises():
            console.print(f"[red]{result.model.name}[/red]", surprise, markup=True, highlight=False, sep=": ")
        for kind, why in result.model.exceptions.items():
            console.print(f"{result.model.name}: {kind}: {why}", markup=False, highlight=False)
    if options.write:
        rows |= {result.model.name: report.row(result) for result in results}
        PAGE.write_text(report.page(rows), encoding="utf-8")
        console.print(f"wrote {PAGE}")
    return int(any(result.surprises() for result in results))


if __name__ == "__main__":
    sys.exit(main())
