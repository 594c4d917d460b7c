"""Finished cases on disk, one JSON object a line: a run that is killed goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from benchmarks.fuzz.worker import Result

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("ir", "frontends", "passes", "codegen", "targets", "tersor", "benchmarks/fuzz")


class Journal:
    """The results of a part so far, for this state of the sources."""

    def __init__(self, path: Path):
        self.path = path
        self.results: dict[int, Result] = {}
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    result = Result.from_dict(json.loads(line))
                except (ValueError, KeyError, TypeError):
                    continue  # cut off when the run was killed
                self.results[result.seed] = result

    def add(self, result: Result) -> None:
        """Keeps a result; it is on disk when this returns."""
        self.results[result.seed] = result
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write("\n" * self._cut() + json.dumps(result.to_dict()) + "\n")

    def _cut(self) -> bool:
        """Whether the last line has no end."""
        if not self.path.is_file() or not self.path.stat().st_size:
            return False
        with self.path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read() != b"\n"


def default_path(part: str) -> Path:
    """Where the journal of a part is kept for these sources, in the user's cache folder (XDG_CACHE_HOME)."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "tersor" / "fuzz" / f"{part}-{fingerprint()}.jsonl"


def fingerprint() -> str:
    """Changes with every source file that a case may run through."""
    digest = hashlib.sha256()
    for folder in SOURCES:
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]
