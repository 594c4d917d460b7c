"""What a run found, as JSON and as Markdown tables."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tersor import targets
from tersor.peers import US, Measurement

TOLERANCE = 1e-4
"""Difference to torch eager, relative to the output's scale, above which an output is marked as wrong."""

BUSY = 0.05
"""Share of a core used between turns that is worth a remark: it slows the others."""


@dataclass
class Entry:
    """One model at one shape on a number of threads, with what every engine did.

    `floor` is the time of the integer products alone at the machine's peak, in milliseconds (`benchmarks.floor`).
    """

    model: str
    shape: str
    threads: int
    measurements: list[Measurement]
    floor: float | None = None

    def ratio(self, peer: str) -> float | None:
        """Peer's median / our median: above 1 we are faster."""
        medians = {m.engine: m.median for m in self.measurements}
        ours, theirs = medians.get(US), medians.get(peer)
        return theirs / ours if ours and theirs else None


@dataclass
class Report:
    """A whole run; `recipe` is ours."""

    date: str
    command: str
    machine: dict[str, object]
    recipe: str = "fp32"
    entries: list[Entry] = field(default_factory=list)

    def write(self, folder: Path, name: str) -> tuple[Path, Path]:
        """Write `name`.json and `name`.md into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        data = asdict(self)
        for entry, plain in zip(self.entries, data["entries"], strict=True):
            for measurement, row in zip(entry.measurements, plain["measurements"], strict=True):
                row |= {
                    "milliseconds": [round(value, 4) for value in measurement.milliseconds],
                    "minimum": measurement.minimum,
                    "median": measurement.median,
                    "ratio": entry.ratio(measurement.engine),
                }
        (folder / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        (folder / f"{name}.md").write_text(self.markdown(), encoding="utf-8")
        return folder / f"{name}.json", folder / f"{name}.md"

    def markdown(self) -> str:
        """Tables of median (minimum) latency and ratio, one per number of threads, and what went wrong."""
        measurements = [m for entry in self.entries for m in entry.measurements]
        engines = list(dict.fromkeys(m.engine for m in measurements))
        lines = [
            f"# Latency, recipe {self.recipe}, {self.date}",
            "",
            "; ".join(f"{key}: {value}" for key, value in self.machine.items()),
            "",
            ", ".join(dict.fromkeys(m.version for m in measurements if m.version)),
            "",
            f"`{self.command}`",
            "",
            "Milliseconds: median (minimum); in brackets the peer's median / ours: above 1 we are faster.",
            f"`!` marks an output further than {TOLERANCE:g} of its scale from torch eager."
            if self.recipe == "fp32"
            else "cos: cosine to torch eager's output in float32; with random weights, which proves no accuracy.",
        ]
        floors = any(entry.floor for entry in self.entries)
        if floors:
            lines.append(
                "Floor: the integer products alone, at the peak measured next to the entry; ours / it in brackets."
            )
        for threads in sorted({entry.threads for entry in self.entries}):
            lines += ["", f"## {threads} thread{'s' * (threads > 1)}", ""]
            columns = ["model", "input", *engines, *["floor"] * floors]
            lines += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
            for entry in self.entries:
                if entry.threads == threads:
                    cells = {m.engine: self._cell(entry, m) for m in entry.measurements}
                    row = [entry.model, entry.shape, *(cells.get(engine, "") for engine in engines)]
                    row += [_floor(entry)] * floors
                    lines.append(f"| {' | '.join(row)} |")
        notes = []
        for entry in self.entries:
            for m in entry.measurements:
                place = f"{m.engine} on {entry.model} {entry.shape}, {entry.threads} thread(s)"
                if m.failure:
                    notes.append(f"* {place}: {m.failure}")
                if m.idle_load > BUSY:
                    notes.append(f"* {place}: used {m.idle_load:.0%} of a core between its turns")
        return "\n".join(lines + ["", *notes] if notes else lines) + "\n"

    def _cell(self, entry: Entry, measurement: Measurement) -> str:
        if measurement.median is None:
            return "failed" if measurement.failure else ""
        return f"{_figures(entry, measurement)}{self._remark(measurement)}"

    def _remark(self, m: Measurement) -> str:
        if self.recipe == "fp32":
            return "!" if m.error is not None and m.error > TOLERANCE else ""
        return "" if m.cosine is None else f" cos {m.cosine:.6f}"


def _figures(entry: Entry, m: Measurement) -> str:
    """Median (minimum) and the ratio."""
    ratio = entry.ratio(m.engine) if m.engine != US else None
    return f"{m.median:.4g} ({m.minimum:.4g})" + (f" [{ratio:.2f}]" if ratio else "")


def _floor(entry: Entry) -> str:
    ours = next((m.median for m in entry.measurements if m.engine == US), None)
    if not entry.floor:
        return ""
    return f"{entry.floor:.4g}" + (f" [{ours / entry.floor:.2f}]" if ours else "")


def machine() -> dict[str, object]:
    """CPU, cores, memory and system, for the record."""
    native = targets.resolve("native")
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    model = next(
        (line.partition(":")[2].strip() for line in info if line.startswith("model name")), "unknown"
    )
    return {
        "cpu": f"{model} ({native.mcpu})",
        "cores": native.cores,
        "memory": f"{(native.memory or 0) / 2**30:.1f} GiB",
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def line(entry: Entry) -> str:
    """One entry on one line, to follow a run: median (minimum) [peer's median / ours], cosine to torch."""
    parts = []
    for m in entry.measurements:
        if m.median is None:
            parts.append(f"{m.engine} failed: {m.failure}")
            continue
        wrong = f" cos {m.cosine:.6f}" if m.error is not None and m.error > TOLERANCE else ""
        parts.append(f"{m.engine} {_figures(entry, m)}{wrong}")
    if entry.floor:
        parts.append(f"floor {_floor(entry)}")
    return f"{entry.model} {entry.shape} {entry.threads} thr: " + "; ".join(parts)
