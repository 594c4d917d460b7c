"""A pipeline: passes in the user's order, checked before any work."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any, Self

from tersor.errors import InputError, PipelineError
from tersor.ir import Program
from tersor.passes.base import Pass
from tersor.passes.calibration import Calibration, Dataset
from tersor.passes.context import Context
from tersor.passes.gates import Budget, Fidelity, Stage
from tersor.passes.manager import Manager
from tersor.passes.order import arranged, violations
from tersor.passes.plan import Plan
from tersor.passes.registry import make
from tersor.passes.report import Report

Entry = Pass | type[Pass] | str | Mapping[str, Any] | Stage


class Pipeline:
    """Passes and stages in order.

    An entry is a pass, its class, its registered name, ``{"pass": name, option: value}`` or a `Stage`. Editing
    methods change the pipeline and return it.

    Attributes:
        name: what reports call it.
        steps: the passes and stages.
    """

    def __init__(self, steps: Iterable[Entry] = (), name: str = "custom"):
        self.name = name
        self.steps: list[Pass | Stage] = [step if isinstance(step, Stage) else make(step) for step in steps]

    @property
    def passes(self) -> list[Pass]:
        """All passes in order, those of stages included."""
        return [p for step in self.steps for p in _passes_of(step)]

    def __iter__(self) -> Iterator[Pass | Stage]:
        return iter(self.steps)

    def __len__(self) -> int:
        return len(self.steps)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pipeline) and self.steps == other.steps

    def __repr__(self) -> str:
        return f"Pipeline([{', '.join(map(str, self.steps))}], name={self.name!r})"

    # -- editing

    def insert(self, step: Entry, *, after: str | None = None, before: str | None = None) -> Self:
        """Puts a step behind or in front of the pass (or stage) of that name.

        Raises:
            PipelineError: not exactly one of ``after`` and ``before`` is given, the name is not there, or is there
                more than once.
        """
        if (after is None) == (before is None):
            raise PipelineError(
                "insert needs one of after= and before=", fix="name the pass to put it next to"
            )
        new = step if isinstance(step, Stage) else make(step)
        index, inner = self._find(after or before)
        if inner is None:
            self.steps.insert(index + (after is not None), new)
        elif isinstance(new, Stage):
            raise PipelineError(f"stage {new.name!r} cannot go into stage {self.steps[index].name!r}")
        else:
            passes = list(self.steps[index].passes)
            passes.insert(inner + (after is not None), new)
            self.steps[index] = replace(self.steps[index], passes=tuple(passes))
        return self

    def remove(self, name: str) -> Self:
        """Takes out the pass or stage of that name.

        Raises:
            PipelineError: the name is not there, or is there more than once.
        """
        return self._put(name, ())

    def replace(self, name: str, step: Entry) -> Self:
        """Puts another step in the place of the pass or stage of that name.

        Raises:
            PipelineError: the name is not there, or is there more than once.
        """
        return self._put(name, (step if isinstance(step, Stage) else make(step),))

    def _put(self, name: str, new: tuple[Pass | Stage, ...]) -> Self:
        index, inner = self._find(name)
        if inner is None:
            self.steps[index : index + 1] = new
            return self
        passes = list(self.steps[index].passes)
        passes[inner : inner + 1] = new
        # a stage without passes judges nothing
        self.steps[index : index + 1] = [replace(self.steps[index], passes=tuple(passes))] if passes else []
        return self

    def _find(self, name: str) -> tuple[int, int | None]:
        """Index of a step and, for a pass inside a stage, its index there."""
        found: list[tuple[int, int | None]] = [
            (i, None) for i, step in enumerate(self.steps) if step.name == name
        ]
        for i, step in enumerate(self.steps):
            if isinstance(step, Stage):
                found += [(i, j) for j, inner in enumerate(step.passes) if inner.name == name]
        if len(found) == 1:
            return found[0]
        names = [step.name for step in self.steps] + [p.name for p in self.passes]
        if found:
            places = ", ".join(str(i + 1) for i, _ in found)
            raise PipelineError(
                f"{name!r} is in the pipeline {len(found)} times",
                why=f"at {places}",
                fix="edit pipeline.steps, a list",
            )
        near = difflib.get_close_matches(name, names, 1)
        raise PipelineError(
            f"there is no {name!r} in the pipeline",
            why=f"it has {', '.join(names) or 'no passes'}",
            fix=f"did you mean {near[0]!r}?" if near else None,
        )

    # -- order

    def check(self, program: Program | None = None, context: Context | None = None) -> None:
        """Checks the order by the passes' facts; nothing runs.

        Without a program, only what is wrong for every freshly captured one is found; with it, each site is looked at.

        Raises:
            PipelineError: listing every violation, each with what to do.
            InputError: ``program`` is none.
        """
        if program is not None and not isinstance(program, Program):
            raise InputError(
                f"a pipeline runs on a Program, and not on a {type(program).__name__}",
                fix="make one of a model by tersor.capture, or give it to tersor.compile(model, ..., recipe=pipeline)",
            )
        found = violations(self.passes, program, context.records if context else None)
        if found:
            listed = "\n".join(f"  - {violation}" for violation in found)
            count = "one place" if len(found) == 1 else f"{len(found)} places"
            raise PipelineError(f"pipeline {self.name!r} is wrong in {count}:\n{listed}")

    def arrange(self) -> Self:
        """Sorts the steps along the canonical order, as their facts demand; stable where nothing demands.

        Raises:
            PipelineError: no order is right; the message names the circle.
        """
        for index, step in enumerate(self.steps):
            if isinstance(step, Stage):
                inner = arranged([[p] for p in step.passes])
                self.steps[index] = replace(step, passes=tuple(step.passes[i] for i in inner))
        self.steps = [self.steps[i] for i in arranged([_passes_of(step) for step in self.steps])]
        return self

    # -- running

    def explain(self, program: Program | None = None) -> Plan:
        """The plan, to print; nothing runs.

        Raises:
            PipelineError: the order is wrong.
        """
        self.check(program)
        return Plan(self.name, tuple(self.steps))

    def run(
        self, program: Program, context: Context | None = None, *, calibration: Any = None
    ) -> tuple[Program, Report]:
        """Runs the passes on a copy; the given program stays as it is, also when a pass fails.

        Args:
            calibration: data for passes that need some: batches in any form that
                `tersor.passes.calibration.Calibration` takes, or one of those. Stages are judged on the part that is
                held out, unless the context has an ``evaluate`` of its own.

        Raises:
            PipelineError: the order is wrong, a pass needs data and there is none, or a pass failed or broke what it
                declares.
            InputError: the calibration data does not fit the program.
            BudgetError: a stage failed that asks to stop.
        """
        context = context or Context()
        self.check_data(calibration is not None or context.calibration is not None)
        self.check(program, context)
        if calibration is not None:
            context = replace(context, calibration=Dataset.read(Calibration.of(calibration), program.main))
        judged = any(isinstance(step, Stage) for step in self.steps)
        if judged and context.evaluate is None and context.calibration is not None:
            context = replace(context, evaluate=Fidelity(program, context.calibration.held_out))
        return Manager(context, self.name).run(self.steps, program)

    def check_data(self, given: bool) -> None:
        """Checks that calibration data is given if a pass needs some.

        Raises:
            PipelineError: it is not; the message names recipes that do without.
        """
        from tersor.passes import recipes  # they are made of pipelines

        needing = _needing_data(self.passes)
        if given or not needing:
            return
        free = {name: recipes.get(name).passes for name in recipes.names()}
        stages = {p.stage for p in self.passes if p.calibrated and p.stage}
        alike = {
            name: (
                len(stages & {p.stage for p in passes}),
                difflib.SequenceMatcher(None, name, self.name).ratio(),
            )
            for name, passes in free.items()
            if not _needing_data(passes)
        }
        near = max(alike, key=alike.get)
        work, name = alike[near]
        instead = f", or use recipe {near!r}, which needs none" if work or name > 0.6 else ""
        raise PipelineError(
            f"recipe {self.name!r} needs calibration data, and there is none",
            why=f"{', '.join(dict.fromkeys(needing))} measure values inside the program",
            fix=f"give calibration=batches (--calibration FOLDER){instead}",
        )

    # -- configuration

    def config(self) -> dict[str, Any]:
        """The pipeline as plain data, as a TOML file holds it (see `tersor.passes.recipes`)."""
        return {"name": self.name, "steps": [_config_of(step) for step in self.steps]}


def _passes_of(step: Pass | Stage) -> tuple[Pass, ...]:
    return step.passes if isinstance(step, Stage) else (step,)


def _needing_data(passes: Iterable[Pass]) -> list[str]:
    """Names of the passes that cannot do without calibration data."""
    return [p.name for p in passes if p.calibrated and not p.optional]


def _config_of(step: Pass | Stage) -> dict[str, Any]:
    if isinstance(step, Stage):
        default = Budget()
        budget = {k: v for k, v in asdict(step.budget).items() if v != getattr(default, k)}
        passes = [_config_of(p) for p in step.passes]
        return {"stage": step.name, "passes": passes, "budget": budget, "on_fail": step.on_fail}
    return {"pass": step.name} | {k: v for k, v in step.config().items() if v is not None}
