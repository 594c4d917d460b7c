"""How results look on a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tersor.peers import Measurement


class Steps:
    """Names each step as it starts and says how long it took when it ends; on standard error."""

    def __init__(self) -> None:
        self._since: float | None = None

    def __call__(self, step: str) -> None:
        """A step begins."""
        self.done()
        print(f"{step} ... ", end="", file=sys.stderr, flush=True)
        self._since = time.perf_counter()

    def done(self) -> None:
        """The last step has ended."""
        if self._since is not None:
            print(f"{time.perf_counter() - self._since:.1f} s", file=sys.stderr, flush=True)
        self._since = None

    def __enter__(self) -> Steps:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None:
            self.done()
        elif self._since is not None:
            print("failed", file=sys.stderr, flush=True)


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], *, right: Sequence[str] = ()) -> None:
    """Print rows under column headings; columns named in `right` are aligned to the right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        shown.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        shown.add_row(*(str(cell) for cell in row))
    # Without a terminal there is no width to fit into: lines stay whole for grep.
    Console(width=None if sys.stdout.isatty() else 200, highlight=False, markup=False).print(shown)


def latencies(measurements: Iterable[Measurement]) -> list[tuple[str, ...]]:
    """Rows for a table of engines: name and version, median, minimum, ratio to ours, error."""
    from tersor.peers import US

    measurements = list(measurements)
    ours = next((m.median for m in measurements if m.engine == US), None)
    rows = []
    for m in measurements:
        if m.median is None:
            rows.append((m.version or m.engine, f"failed: {m.failure}", "", "", ""))
            continue
        ratio = f"{m.median / ours:.2f}" if ours and m.engine != US else ""
        error = "" if m.error is None else f"{m.error:.1e}"
        rows.append((m.version, f"{m.median:.3g}", f"{m.minimum:.3g}", ratio, error))
    return rows


LATENCY_COLUMNS = ("engine", "median ms", "min ms", "its median / ours", "error")


def folder_bytes(folder: Path) -> int:
    """Size of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def human(count: int) -> str:
    """Bytes with a decimal unit, as file sizes are given: 91.1 MB."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"
