"""Runs passes: copies, guards, verifies, compares, times, judges, records. Authors of passes do none of it."""

from __future__ import annotations

import glob
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from tersor.errors import BudgetError, InputError, PipelineError, ProgramError, TersorError
from tersor.ir import Program, verify
from tersor.ir.costs import cost, evaluated, node_cost
from tersor.passes import checks, facts
from tersor.passes.base import Equivalent, Exact, Finding, Lossy, Pass, PassResult
from tersor.passes.cache import StepCache
from tersor.passes.calibration import calibrate
from tersor.passes.checks import Fault, Present
from tersor.passes.context import Context
from tersor.passes.gates import Stage
from tersor.passes.guard import NoParameterWrites
from tersor.passes.numerics import (
    Inputs,
    Outputs,
    outputs,
    precision,
    relative_error,
    small_inputs,
    small_sizes,
)
from tersor.passes.report import GateReport, Report, Size, StepReport
from tersor.passes.sites import names, shares

COMPARED_BYTES = 128 << 20
COMPARED_MACS = 20_000_000_000
"""With ``numerics="auto"``, programs up to this size and work are compared before and after every pass."""

LAST_PLACES = 32
"""By how many units in the last place an exact pass may change a result (see `Exact`)."""


@dataclass
class _Version:
    """A program on its way through the passes, with what has been found out about it."""

    program: Program
    digest: str
    size: Size
    reference: Program  # the last version with the same meaning at every site, before lossy passes
    results: Outputs | None = None  # in the program's own types
    precise: Outputs | None = None  # in float64
    present: Present | None = None
    figures: dict[str, float] | None = None  # bytes, latency and fidelity
    shares: dict[str, Mapping[str, float]] | None = None  # its sites' parts of work and time

    @staticmethod
    def of(program: Program, reference: Program | None = None) -> _Version:
        return _Version(program, program.digest(), Size.of(program), reference or program)

    def after(self, pass_: Pass, program: Program) -> _Version:
        """What a pass made of it. Equivalent passes move values between places: nothing before them is comparable."""
        moved = isinstance(pass_.numerics, Equivalent)
        return _Version.of(program, None if moved else self.reference)


class Manager:
    """One run of a list of passes and stages over a program, which stays as it is."""

    def __init__(self, context: Context, pipeline: str = "custom"):
        self.context = context
        self.report = Report(pipeline)
        self._cache = StepCache(context.cache) if context.cache is not None else None
        self._done: list[str] = []
        self._reverted: dict[str, str] = {}  # fact -> the stage that gave it and was taken back
        self._inputs: Inputs | None = None
        self._start: _Version | None = None

    def run(self, steps: Sequence[Pass | Stage], program: Program) -> tuple[Program, Report]:
        """The changed program and the report.

        Raises:
            PipelineError: a pass failed, broke the program or a declaration; the message says which, after which.
            BudgetError: a stage failed and asks to stop; its ``report`` attribute has the figures.
            ProgramError: the program was not well formed to begin with.
        """
        verify(program)
        if self.context.calibration is not None:
            self.report.notes += self.context.calibration.notes
        version = self._start = _Version.of(program, self.context.reference)
        self._inputs = self._comparison_inputs(version)
        for step in steps:
            version = (
                self._run_stage(step, version) if isinstance(step, Stage) else self._run_pass(step, version)
            )
        return version.program, self.report

    # -- one pass

    def _run_pass(self, pass_: Pass, before: _Version, stage: str | None = None) -> _Version:
        if self.context.progress is not None:
            self.context.progress(pass_.name)
        step = StepReport.of(pass_, stage, before.size)
        after = before
        if reasons := self._reasons_to_leave_out(pass_, before):
            step.status, step.notes = "skipped", reasons
        else:
            barred = facts.barred(pass_, before.program)
            narrowed = replace(pass_, skip=(*pass_.skip, *map(glob.escape, barred))) if barred else pass_
            after = self._execute(narrowed, before, step)
            step.skips += [Finding(site, f"it is {fact!r} already") for site, fact in barred.items()]
            self._done.append(pass_.name)
        step.after = after.size
        self.report.steps.append(step)
        return after

    def _reasons_to_leave_out(self, pass_: Pass, version: _Version) -> list[str]:
        """What a pass that is left out lacks: data that it can do without, or the work of a stage that was taken back.

        Raises:
            PipelineError: its facts do not fit for another reason.
        """
        if pass_.calibrated and pass_.optional and self.context.calibration is None:
            return ["it goes by calibration data, and there is none"]
        unmet = facts.unmet(pass_, version.program, self.context.records)
        if all(u.required and u.fact in self._reverted for u in unmet):
            return [f"it {u}; stage {self._reverted[u.fact]!r}, which gave it, was reverted" for u in unmet]
        raise self._failure(
            pass_, Fault(f"it {'; '.join(map(str, unmet))}", "check the order with pipeline.check(program)")
        )

    def _execute(self, pass_: Pass, before: _Version, step: StepReport) -> _Version:
        """The version after a pass: from the cache, or by running and checking it."""
        key = None
        if self._cache is not None:
            key = self._cache.key(pass_, self._context_of(pass_, before), before.program)
        if key is not None and (program := self._cache.load(key, before.program, step)) is not None:
            return before if program is before.program else before.after(pass_, program)
        program = self._perform(pass_, before, step)
        if program.digest() == before.digest:
            after = before
            if step.changes:
                step.notes.append(
                    f"it names {len(step.changes)} places as changed, but the program is the same"
                )
        else:
            after, step.status = before.after(pass_, program), "changed"
            if not step.changes:
                step.notes.append("it changed the program without saying where")
            if fault := self._fault(pass_, before, after, step):
                raise self._failure(pass_, fault)
        if key is not None:
            self._cache.store(key, before.program, after.program, step)
        return after

    def _perform(self, pass_: Pass, before: _Version, step: StepReport) -> Program:
        """Runs a pass on a copy; the result is well formed."""
        program = before.program.copy()
        known = {f"%{node.name}": name for node, name in names(program).items()}
        started = time.perf_counter()
        context = self._with_statistics(pass_, program, self._context_of(pass_, before))
        try:
            with NoParameterWrites(program.parameters):
                result = pass_.run(program, context)
        except Exception as error:
            raise self._failure(pass_, Fault(f"{type(error).__name__}: {error}")) from error
        step.seconds = time.perf_counter() - started
        if not isinstance(result, PassResult):
            raise self._failure(pass_, Fault(f"run returned {type(result).__name__}", "return a PassResult"))
        parts = self._shares(before) if isinstance(pass_.numerics, Lossy) else {}
        step.changes = [_placed(c, known.get(c.site, c.site), parts) for c in result.changes]
        step.skips = [replace(s, site=known.get(s.site, s.site)) for s in result.skips]
        step.summary = result.summary
        step.skips += checks.idle_patterns(pass_, before.program)
        program.drop_unused_parameters()
        try:
            verify(program)
        except ProgramError as error:
            raise self._failure(pass_, Fault(str(error))) from error
        return program

    def _context_of(self, pass_: Pass, version: _Version) -> Context:
        """What a pass may see: data if it is calibrated, the reference if it recovers."""
        return replace(
            self.context,
            calibration=self.context.calibration if pass_.calibrated else None,
            reference=version.reference if pass_.recovers else None,
        )

    @staticmethod
    def _with_statistics(pass_: Pass, program: Program, context: Context) -> Context:
        """The context with the statistics that a calibrated pass asks for."""
        data = context.calibration
        if data is None:
            return context
        statistics = calibrate(
            program,
            pass_.requests(program),
            data,
            seed=context.seed,
            cache=context.cache,
            title=f"calibrating {pass_.name}",
        )
        return replace(context, statistics=statistics)

    def _fault(self, pass_: Pass, before: _Version, after: _Version, step: StepReport) -> Fault | None:
        """The first thing that a pass broke, if any."""
        had, has, changed = self._present(before), self._present(after), {c.site for c in step.changes}
        return (
            checks.changed_signature(before.program, after.program)
            or checks.broken_promise(pass_, after.program, has, changed, self.context.records)
            or checks.lost_facts(pass_, after.program, had, has)
            or self._compare(pass_, before, after, step)
        )

    def _failure(self, pass_: Pass, fault: Fault) -> PipelineError:
        after = f"after {', '.join(self._done)}" if self._done else "the first to run"
        return PipelineError(
            f"pass {pass_.name!r} failed: {fault.what}", where=f"{pass_}, {after}", fix=fault.fix
        )

    @staticmethod
    def _present(version: _Version) -> Present:
        if version.present is None:
            version.present = frozenset(facts.present(version.program))
        return version.present

    def _shares(self, version: _Version) -> dict[str, Mapping[str, float]]:
        """Each site's parts of the whole, by the name of the figure."""
        if version.shares is None:
            version.shares = {"macs_share": shares(_macs(version.program))}
            if self.context.profile is not None:
                version.shares["latency_share"] = shares(self.context.profile(version.program))
        return version.shares

    # -- results before and after

    def _comparison_inputs(self, start: _Version) -> Inputs | None:
        mode, program = self.context.numerics, start.program
        if mode == "never":
            return None
        macs = sum(cost(program, small_sizes(f)).functions[n].macs for n, f in program.functions.items())
        if mode == "auto" and (start.size.bytes > COMPARED_BYTES or macs > COMPARED_MACS):
            self.report.notes.append(
                "the results before and after each pass were not compared: the program is too large for "
                'numerics="auto"; numerics="always" compares'
            )
            return None
        return self.context.inputs or small_inputs(program, self.context.seed)

    def _compare(self, pass_: Pass, before: _Version, after: _Version, step: StepReport) -> Fault | None:
        """Measures the error of a pass and holds it to its declared class."""
        if self._inputs is None or not self._runs(before):
            return None
        try:
            self._precise(after)
        except Exception as error:
            return Fault(f"its result does not run: {type(error).__name__}: {error}")
        exact = isinstance(pass_.numerics, Exact)
        results = self._results if exact else self._precise
        step.error = relative_error(results(before), results(after))
        step.total_error = relative_error(self._precise(self._start), self._precise(after))
        allowed = pass_.numerics.rtol if isinstance(pass_.numerics, Equivalent) else math.inf
        if exact:
            allowed = LAST_PLACES * precision(self._results(before))
        if before is not self._start:
            before.precise = before.results = None  # two sets of results are enough to hold
        if step.error <= allowed:
            return None
        return Fault(f"it is declared {pass_.numerics}, but results differ by {step.error:.2e}")

    def _runs(self, version: _Version) -> bool:
        """Whether a program runs on the inputs; those made from its signature may be none that it can take."""
        try:
            self._precise(version)
        except Exception as error:
            if self.context.inputs is not None:
                raise InputError(
                    "the program does not run on the inputs given for comparison",
                    why=f"{type(error).__name__}: {error}",
                    fix="give inputs by function and input name: Context(inputs={'main': {...}})",
                ) from error
            self._inputs = None
            self.report.notes.append(
                "the results before and after each pass were not compared: the program does not run on inputs made from"
                f" its signature ({type(error).__name__}: {error}); Context(inputs=...) gives others"
            )
            return False
        return True

    def _results(self, version: _Version) -> Outputs:
        if version.results is None:
            version.results = outputs(version.program, self._inputs)
        return version.results

    def _precise(self, version: _Version) -> Outputs:
        if version.precise is None:
            version.precise = outputs(version.program, self._inputs, torch.float64)
        return version.precise

    # -- stages

    def _run_stage(self, stage: Stage, before: _Version) -> _Version:
        start, first, done = self._figures(stage, before), len(self.report.steps), len(self._done)
        figures, version = start, before
        for pass_ in stage.passes:
            previous, version = version, self._run_pass(pass_, version, stage.name)
            if version is not previous:
                figures = self._figures(stage, version)
                self.report.steps[-1].judged(figures)
        if version is before:
            self.report.gates.append(GateReport(stage.name, "unchanged", [], start, start))
            return before
        gate = GateReport(stage.name, "kept", stage.budget.failures(start, figures), start, figures)
        self.report.gates.append(gate)
        if not gate.reasons:
            return version
        if stage.on_fail == "warn":
            gate.decision = "warned"
            return version
        if stage.on_fail == "stop":
            gate.decision = "stopped"
            error = BudgetError(
                f"stage {stage.name!r} failed: {'; '.join(gate.reasons)}",
                where=f"passes {', '.join(p.name for p in stage.passes)}",
                fix="relax its budget, remove a pass, or use on_fail='revert'",
            )
            error.report = self.report
            raise error
        gate.decision = "reverted"
        for step in self.report.steps[first:]:
            step.revert()
        del self._done[done:]
        self._reverted |= {fact: stage.name for p in stage.passes for fact in p.provides}
        return before

    def _figures(self, stage: Stage, version: _Version) -> dict[str, float]:
        """Bytes, latency and fidelity of a program, as far as they can be had."""
        if version.figures is None:
            version.figures = {"bytes": version.size.bytes}
            try:
                if self.context.measure is not None:
                    version.figures["latency"] = self.context.measure(version.program)
                if self.context.evaluate is not None:
                    version.figures |= self.context.evaluate(version.program)
            except TersorError:
                raise
            except Exception as error:
                raise PipelineError(
                    f"judging stage {stage.name!r} failed: {type(error).__name__}: {error}",
                    where=f"after {', '.join(self._done)}" if self._done else "before its first pass",
                ) from error
        figures = version.figures
        if missing := sorted(stage.budget.needs - figures.keys()):
            raise PipelineError(
                f"the budget of stage {stage.name!r} needs {', '.join(missing)}, which nothing evaluates",
                fix="give the run held-out data (Context.evaluate), or take the limit out of the budget",
            )
        return figures


def _macs(program: Program) -> dict[str, float]:
    """Each site's multiply-accumulates in all functions; sites without any are left out."""
    named, work = names(program), {}
    for function in program.functions.values():
        sizes = {name: limits.max for name, limits in function.dims.items()}
        for node in function.calls():
            if macs := evaluated(node_cost(node).macs, sizes):
                work[named[node]] = work.get(named[node], 0) + macs
    return work


def _placed(finding: Finding, site: str, parts: Mapping[str, Mapping[str, float]]) -> Finding:
    """A finding under the name of its site, with the site's parts of the whole where it has figures."""
    if not finding.figures:
        return replace(finding, site=site)
    own = {name: by_site[site] for name, by_site in parts.items() if site in by_site}
    return replace(finding, site=site, figures={**finding.figures, **own})
