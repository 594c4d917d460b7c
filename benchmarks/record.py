"""A table that is printed row by row as a benchmark goes on, and kept as Markdown with how it came about."""

from __future__ import annotations

import datetime
import shlex
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from benchmarks.report import machine


class Record:
    """Title, machine, versions, command, a line on what was measured, and rows under `columns`."""

    def __init__(
        self, title: str, command: Sequence[str], packages: Sequence[str], about: str, columns: Sequence[str]
    ):
        self._now = datetime.datetime.now()
        self._head = [
            f"# {title}, {self._now:%Y-%m-%d %H:%M}",
            "; ".join(f"{key}: {value}" for key, value in machine().items()),
            ", ".join(f"{name} {metadata.version(name)}" for name in packages),
            f"`{shlex.join(map(without_folders, command))}`",
            about,
        ]
        self._rows = [_line(columns), "|---" * len(columns) + "|"]
        print("\n\n".join(self._head), "", *self._rows, sep="\n", flush=True)

    def add(self, *cells: str) -> None:
        """One more row."""
        self._rows.append(_line(cells))
        print(self._rows[-1], flush=True)

    def write(self, folder: Path | None, name: str) -> None:
        """Writes `<time>-<name>.md`; without a folder nothing."""
        if folder is not None:
            path = folder / f"{self._now:%Y-%m-%d-%H%M%S}-{name}.md"
            path.write_text("\n\n".join([*self._head, "\n".join(self._rows)]) + "\n", encoding="utf-8")
            print(f"wrote {path}")


def without_folders(argument: str) -> str:
    """An argument for the record: where files lie on this machine is nobody's business."""
    path = Path(argument)
    if path.is_file():
        return in_folder(path)
    return path.name if path.is_absolute() else argument


def in_folder(file: Path) -> str:
    """A file by its name and its folder's: many are called model.onnx."""
    return f"{file.parent.name}/{file.name}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
