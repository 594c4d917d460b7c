"""What a run found: counts, defects with their numbers, peak memory; as JSON and Markdown."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.fuzz.case import BAD, GOOD
from benchmarks.fuzz.worker import Result

PACKAGES = ("apache-tvm", "torch", "onnx", "onnxruntime", "onnxscript", "numpy")
SHOWN = 2000  # characters of a defect's details


@dataclass(frozen=True)
class Summary:
    """A part's results, and how they were got."""

    part: str
    command: str
    date: str
    machine: dict[str, Any]
    results: Sequence[Result]

    @property
    def defects(self) -> list[Result]:
        return [r for r in self.results if r.outcome.kind in BAD]

    def counts(self) -> dict[str, dict[str, int]]:
        """Kind -> label -> number of cases, the most frequent first."""
        found: dict[str, Counter[str]] = {kind: Counter() for kind in (*GOOD, *BAD)}
        for result in self.results:
            found[result.outcome.kind][result.outcome.label] += 1
        return {kind: dict(labels.most_common()) for kind, labels in found.items()}

    def to_dict(self) -> dict[str, Any]:
        return {
            "part": self.part,
            "command": self.command,
            "date": self.date,
            "machine": self.machine,
            "versions": versions(),
            "cases": len(self.results),
            "seeds": [
                min((r.seed for r in self.results), default=0),
                max((r.seed for r in self.results), default=0),
            ],
            "seconds": round(sum(r.seconds for r in self.results), 1),
            "slowest": max((round(r.seconds, 1) for r in self.results), default=0),
            "peak_memory_mib": max((r.memory >> 20 for r in self.results), default=0),
            "counts": self.counts(),
            "defects": [r.to_dict() for r in self.defects],
        }

    def markdown(self) -> str:
        """One table of counts, and each defect with the command that replays it."""
        data = self.to_dict()
        lines = [
            f"# Fuzzing {self.part}, {self.date}",
            "",
            "; ".join(f"{key}: {value}" for key, value in self.machine.items()),
            "",
            ", ".join(f"{name} {version}" for name, version in data["versions"].items()),
            "",
            f"`{self.command}`",
            "",
            f"{data['cases']} cases, numbers {data['seeds'][0]} to {data['seeds'][1]}, {data['seconds']:.0f} s "
            f"(slowest {data['slowest']:.0f} s); most memory that a case took: {data['peak_memory_mib']} MiB.",
            "",
            "| outcome | cases | of these |",
            "|---|---|---|",
        ]
        for kind, labels in data["counts"].items():
            named = ", ".join(f"{label} {count}" for label, count in labels.items() if label)
            lines.append(f"| {kind} | {sum(labels.values())} | {named} |")
        for result in self.defects:
            outcome = result.outcome
            lines += ["", f"## {result.seed}: {outcome.kind}, {outcome.label}", ""]
            lines += [f"`{replay(self.part, result.seed)}`", "", "```", outcome.detail[:SHOWN], "```"]
        return "\n".join(lines) + "\n"

    def write(self, folder: Path) -> list[Path]:
        """Writes ``fuzz-<part>.json`` and ``.md`` into the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"fuzz-{self.part}.{ending}" for ending in ("json", "md")]
        for path, text in zip(
            paths, (json.dumps(self.to_dict(), indent=1) + "\n", self.markdown()), strict=True
        ):
            path.write_text(text, encoding="utf-8")
        return paths


def replay(part: str, seed: int) -> str:
    """The command that runs one case again, in view."""
    return f"python -m benchmarks.fuzz {part} --seed {seed} --count 1"


def versions() -> dict[str, str]:
    """Of the packages that take part."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
