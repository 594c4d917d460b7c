"""What a pipeline would do, to read before it runs."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tersor.passes.base import STAGES, Pass
from tersor.passes.gates import Stage


@dataclass(frozen=True)
class Plan:
    """The steps of a pipeline in words; print it.

    Attributes:
        name: the pipeline's.
        steps: its passes and stages.
    """

    name: str
    steps: tuple[Pass | Stage, ...]

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data."""
        return {"pipeline": self.name, "steps": [self._entry(p, stage) for p, stage in self._passes()]}

    @property
    def notes(self) -> list[str]:
        """Passes behind one of a later stage: allowed, since their facts permit it, but unusual."""
        found, last = [], None
        for pass_, _ in self._passes():
            if pass_.stage is None:
                continue
            if last is not None and STAGES.index(pass_.stage) < STAGES.index(last.stage):
                found.append(
                    f"{pass_.name} ({pass_.stage}) comes after {last.name} ({last.stage}); the usual order is the other"
                    " way round, which arrange() gives"
                )
            else:
                last = pass_
        return found

    def __str__(self) -> str:
        lines = [f"pipeline {self.name}: {sum(1 for _ in self._passes())} passes"]
        number = 0
        for step in self.steps:
            indent = "  "
            if isinstance(step, Stage):
                lines.append(f"  {step}")
                indent = "    "
            for pass_ in step.passes if isinstance(step, Stage) else (step,):
                number += 1
                lines.append(f"{indent}{number}. {pass_}  [{pass_.numerics}]")
                lines += [f"{indent}   {line}" for line in (summary(type(pass_)), *_facts_of(pass_)) if line]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)

    def _passes(self) -> Iterator[tuple[Pass, str | None]]:
        for step in self.steps:
            if isinstance(step, Stage):
                yield from ((p, step.name) for p in step.passes)
            else:
                yield step, None

    @staticmethod
    def _entry(pass_: Pass, gate: str | None) -> dict[str, Any]:
        facts = {
            kind: sorted(getattr(pass_, kind)) for kind in ("requires", "forbids", "provides", "invalidates")
        }
        return {
            "pass": pass_.name, "config": pass_.config(), "summary": summary(type(pass_)), "gate": gate,
            "numerics": str(pass_.numerics), "order": pass_.stage, "calibrated": pass_.calibrated,
            "optional": pass_.optional, **facts,
        }  # fmt: skip


def summary(cls: type[Pass]) -> str:
    """What a pass does: the first line of its docstring."""
    return (inspect.getdoc(cls) or "").partition("\n")[0]


def _facts_of(pass_: Pass) -> Iterator[str]:
    kinds = (("requires", "needs"), ("forbids", "not where"), ("provides", "gives"), ("invalidates", "ends"))
    named = [f"{word} {', '.join(sorted(held))}" for kind, word in kinds if (held := getattr(pass_, kind))]
    if pass_.calibrated:
        named.append("left out without calibration data" if pass_.optional else "needs calibration data")
    if named:
        yield "; ".join(named)
