"""The zoo's results as a table for the terminal, and as the page docs/zoo.md."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from rich.table import Table

from tests.zoo import ZOO
from tests.zoo.check import Route, ZooResult
from tests.zoo.model import KINDS, ZooModel

COLUMNS = ("model", "torch", "ONNX", "same operations", "same sites", "left decomposed", "operations")
HEAD = """# The zoo

Small models with random weights, one per architecture. Each is captured from torch and from the file that
`torch.onnx.export` writes of it, with dynamic sizes; both programs are compiled in float32 and run at several sizes.
The columns "torch" and "ONNX" are the largest difference to torch over all outputs, relative to each output's scale;
the bar is 1e-5. "Same" compares the canonical programs of the two routes. "Left decomposed" counts attentions, norms
and GELUs that are still several operations.

Written by `python -m tests.zoo --write`; the tests prove each row.
"""


def table(results: Sequence[ZooResult], torchscript: bool) -> Table:
    """One row per model, and which operations it needs."""
    shown = Table(title="The zoo")
    columns = list(COLUMNS)
    if torchscript:
        columns.insert(3, "TorchScript")
    for column in columns:
        shown.add_column(column)
    for result in results:
        cells = row(result)[:-1] + [str(result.routes["torch"].operations.total())]
        if torchscript:
            cells.insert(3, script(result))
        style = "red" if result.surprises() else "yellow" if result.shortcomings() else ""
        shown.add_row(*cells, style=style)
    return shown


def row(result: ZooResult) -> list[str]:
    """What the page says of a model, by `COLUMNS`."""
    left = ", ".join(f"{count} {kind}" for kind, count in result.decomposed.items())
    operations = result.routes["torch"].operations | result.routes["onnx"].operations
    return [
        result.model.name,
        error(result.routes["torch"]),
        error(result.routes["onnx"]),
        "yes" if result.same_operations else "no",
        "yes" if result.same_sites else "no",
        left or "-",
        " ".join(sorted(operations)),
    ]


def error(route: Route) -> str:
    return "no" if route.failure else f"{route.error:.0e}"


def script(result: ZooResult) -> str:
    """The older exporter's route: its error, and whether it gives the operations that torch gives."""
    route = result.routes["torchscript"]
    same = route.operations == result.routes["torch"].operations
    return error(route) + ("" if route.failure or same else ", other operations")


def page(rows: Mapping[str, Sequence[str]]) -> str:
    """The text of docs/zoo.md, from the cells of each model of the zoo."""
    lines = [HEAD]
    by_family: dict[str, list[ZooModel]] = defaultdict(list)
    for model in ZOO:
        by_family[model.family].append(model)
    for family, members in by_family.items():
        lines += [f"## {family.capitalize()}", "", _line(COLUMNS), _line(["---"] * len(COLUMNS))]
        lines += [_line(rows[m.name]) for m in members] + [""]
    lines += ["## What falls short, and why", ""]
    reasons = [f"* **{m.name}**: {KINDS[k]}: {why}." for m in ZOO for k, why in sorted(m.exceptions.items())]
    lines += [*(reasons or ["Nothing."]), ""]
    return "\n".join([*lines, *_coverage(rows), ""])


def rows(page: str) -> dict[str, list[str]]:
    """The cells of each model on the page."""
    tables = page.split("## What falls short")[0]
    cells = [line[2:-2].split(" | ") for line in tables.splitlines() if line.startswith("| ")]
    return {row[0]: row for row in cells if row[0] not in ("---", COLUMNS[0])}


def _coverage(rows: Mapping[str, Sequence[str]]) -> list[str]:
    """Which models need each operation of the dialect."""
    users: dict[str, list[str]] = defaultdict(list)
    for model in ZOO:
        for name in rows[model.name][-1].split():
            users[name].append(model.name)
    lines = ["## Operations", "", _line(("operation", "models", "for example")), _line(["---"] * 3)]
    for name in sorted(users, key=lambda n: (-len(users[n]), n)):
        lines.append(_line((f"`{name}`", str(len(users[name])), ", ".join(users[name][:3]))))
    return lines


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
