"""What a run of a pipeline did: JSON for programs, a table for people."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from tersor.folders import save_json
from tersor.ir import Program
from tersor.ir.costs import cost
from tersor.passes.base import Finding, Pass

Status = Literal["changed", "unchanged", "skipped", "reverted"]


@dataclass(frozen=True)
class Size:
    """How large a program is.

    Attributes:
        parameters: elements of all parameters.
        bytes: bytes of all parameters.
        macs: multiply-accumulates of one call of every function, dynamic dimensions at their largest.
    """

    parameters: int
    bytes: int
    macs: int

    @staticmethod
    def of(program: Program) -> Size:
        return Size(
            sum(p.tensor.numel() for p in program.parameters.values()),
            program.parameters.bytes,
            cost(program).macs,
        )


@dataclass
class StepReport:
    """One pass of a run.

    Attributes:
        name, config: the pass.
        numerics: its declared class, in words.
        stage: the gated stage it ran in; None outside of one.
        status: ``changed`` and ``unchanged`` are derived from the program; ``skipped``: it could not run because a
            stage was taken back, or did not since it is optional and there is no calibration data; ``reverted``: it ran
            and its stage was taken back.
        seconds: time of the pass itself.
        changes, skips: places it changed or left alone, with reasons.
        before, after: sizes of the program.
        error: relative error of the outputs against the program before this pass; None where not compared.
        total_error: the same against the program the run started with.
        fidelity: figures of the injected evaluation after this pass, in a stage.
        latency: seconds per call after this pass by the injected measurement, in a stage.
        summary: what the pass says of all places together.
        notes: anything else a reader should know.
        cached: the result was taken from the cache.
    """

    name: str
    config: dict[str, Any]
    numerics: str
    stage: str | None
    status: Status
    seconds: float
    before: Size
    after: Size
    changes: list[Finding] = field(default_factory=list)
    skips: list[Finding] = field(default_factory=list)
    error: float | None = None
    total_error: float | None = None
    fidelity: dict[str, float] = field(default_factory=dict)
    latency: float | None = None
    summary: str = ""
    notes: list[str] = field(default_factory=list)
    cached: bool = False

    @staticmethod
    def of(pass_: Pass, stage: str | None, size: Size) -> StepReport:
        """The report of a pass that has not run yet."""
        return StepReport(
            pass_.name, pass_.config(), str(pass_.numerics), stage, "unchanged", 0.0, size, size
        )

    def judged(self, figures: Mapping[str, float]) -> None:
        """Takes over what a stage measured after this pass."""
        self.latency = figures.get("latency")
        self.fidelity = {name: value for name, value in figures.items() if name not in ("latency", "bytes")}

    def revert(self) -> None:
        """Says that the stage of this pass was taken back."""
        if self.status == "changed":
            self.status = "reverted"

    @property
    def modified(self) -> bool:
        """Whether the pass changed the program (by the program's digest, not by its own word)."""
        return self.status in ("changed", "reverted")


@dataclass
class GateReport:
    """The judgement of one stage.

    Attributes:
        stage: its name.
        decision: ``kept``, ``reverted``, ``warned`` (kept although it failed), ``stopped`` or ``unchanged``.
        reasons: why it failed; empty when it did not.
        before, after: fidelity figures, ``latency`` in seconds and ``bytes``, of the stage's first and last program.
    """

    stage: str
    decision: Literal["kept", "reverted", "warned", "unchanged", "stopped"]
    reasons: list[str]
    before: dict[str, float]
    after: dict[str, float]


@dataclass
class Report:
    """A whole run.

    Attributes:
        pipeline: name of the pipeline.
        steps: the passes, in order.
        gates: the judgements of its stages, in order.
        notes: what holds for the run as a whole.
    """

    pipeline: str
    steps: list[StepReport] = field(default_factory=list)
    gates: list[GateReport] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return sum(step.seconds for step in self.steps)

    def step(self, name: str) -> StepReport:
        """The last step of that name."""
        return next(step for step in reversed(self.steps) if step.name == name)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, fit for JSON (an infinite figure is the string "inf")."""
        return plain_figures(
            {
                "pipeline": self.pipeline,
                "seconds": self.seconds,
                "steps": [asdict(step) | {"modified": step.modified} for step in self.steps],
                "gates": [asdict(gate) for gate in self.gates],
                "notes": list(self.notes),
            }
        )

    def save(self, path: str | Path) -> None:
        """Writes the report as JSON; InputError when it cannot."""
        save_json(path, self.to_dict())

    def __rich__(self) -> Group:
        parts: list[Any] = [self._table()]
        for gate in self.gates:
            style = {"kept": "green", "unchanged": "dim"}.get(gate.decision, "red")
            parts.append(
                Text(f"stage {gate.stage}: {gate.decision}" + "".join(f"; {r}" for r in gate.reasons), style)
            )
        for step in self.steps:
            if any(finding.figures for finding in (*step.changes, *step.skips)):
                parts.append(_figures(step))
            parts += [Text(f"{step.name}: {note}") for note in (step.summary, *step.notes) if note]
            unmeasured = [finding for finding in step.skips if not finding.figures]
            parts += [Text(f"{step.name} left alone {line}", "dim") for line in _by_reason(unmeasured)]
        return Group(*parts, *(Text(note) for note in self.notes))

    def __str__(self) -> str:
        console = Console(width=140, no_color=True)
        with console.capture() as capture:
            console.print(self)
        return capture.get()

    def _table(self) -> Table:
        table = Table(
            title=f"pipeline {self.pipeline}: {len(self.steps)} passes, {self.seconds:.2f} s",
            title_justify="left",
        )
        for heading in ("pass", "result", "places", "parameters", "bytes", "MACs", "error", "seconds"):
            table.add_column(heading, justify="left" if heading in ("pass", "result") else "right")
        for step in self.steps:
            table.add_row(
                step.name,
                step.status + (" (cached)" if step.cached else ""),
                str(len(step.changes) or ""),
                _change(step.before.parameters, step.after.parameters),
                _change(step.before.bytes, step.after.bytes),
                _change(step.before.macs, step.after.macs),
                "" if step.error is None else f"{step.error:.1e}",
                f"{step.seconds:.2f}",
            )
        return table


def _figures(step: StepReport) -> Table:
    """What a pass measured, place by place."""
    table = Table(title=f"{step.name}, place by place", title_justify="left")
    measured = [f for f in (*step.changes, *step.skips) if f.figures]
    columns = list(dict.fromkeys(name for finding in measured for name in finding.figures))
    table.add_column("site", overflow="fold")
    for column in columns:
        table.add_column(column.replace("_", " "), justify="right")
    table.add_column("result", overflow="fold")
    for finding in measured:
        shown = (_figure(finding.figures.get(c)) for c in columns)
        result = finding.reason if finding in step.changes else f"left alone: {finding.reason}"
        table.add_row(finding.site, *shown, result)
    return table


def _figure(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def plain_figures(data: Any) -> Any:
    """Nested dicts and lists fit for JSON, which has no infinite numbers: those become "inf" and "-inf"."""
    if isinstance(data, dict):
        return {key: plain_figures(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [plain_figures(value) for value in data]
    return str(data) if isinstance(data, float) and not math.isfinite(data) else data


def _change(before: int, after: int) -> str:
    return f"{after:,}" if before == after else f"{after:,} ({100 * (after - before) / max(before, 1):+.1f}%)"


def _by_reason(findings: list[Finding]) -> list[str]:
    """One line per reason, with how many places and the first of them."""
    places = {
        reason: [f.site for f in findings if f.reason == reason]
        for reason in Counter(f.reason for f in findings)
    }
    return [
        f"{', '.join(sites[:3])}{f' and {len(sites) - 3} more' if len(sites) > 3 else ''}: {reason}"
        for reason, sites in places.items()
    ]
