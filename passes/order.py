"""The order of passes: what is wrong with a given one, and a right one."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import networkx as nx

from tersor.errors import InputError, PipelineError
from tersor.ir import Program
from tersor.passes import facts, registry
from tersor.passes.base import STAGES, Pass
from tersor.passes.facts import Fact, Place, Records


@dataclass(frozen=True)
class Violation:
    """One thing that is wrong with an order of passes.

    Attributes:
        kind: ``order`` (moving a pass repairs it), ``missing`` (nothing gives a required fact), ``forbidden`` (a
            fact that no order avoids) or ``unknown`` (a fact or a site that does not exist).
        pass_: the pass at fault, with its place in the list.
        what: what is wrong.
        fix: what to do.
    """

    kind: Literal["order", "missing", "forbidden", "unknown"]
    pass_: str
    what: str
    fix: str

    def __str__(self) -> str:
        return f"[{self.kind}] {self.pass_} {self.what}\n      fix: {self.fix}"


@dataclass
class _Holder:
    """Who made a fact hold, and where (None: everywhere, or not known without a program)."""

    step: int | None  # None: the program has it from the start
    places: set[Place] | None


@dataclass
class _Walk:
    """Follows the facts through a list of passes without running any."""

    passes: Sequence[Pass]
    program: Program | None
    records: Records | None
    held: dict[str, list[_Holder]] = field(default_factory=dict)
    ended: dict[str, int] = field(default_factory=dict)

    def violations(self) -> Iterator[Violation]:
        unknown = {name for p in self.passes for name in _named_facts(p) if name not in facts.names()}
        yield from self._unknown_names(unknown)
        for fact in facts.known():
            self.held[fact.name] = self._from_the_start(fact)
        for step, pass_ in enumerate(self.passes):
            for name in sorted(pass_.requires - unknown):
                yield from self._required(step, facts.get(name))
            for name in sorted(pass_.forbids - unknown):
                yield from self._forbidden(step, facts.get(name))
            yield from self._end_facts(step)
            for name in pass_.provides - unknown:
                self.held[name].append(_Holder(step, self._places(step, facts.get(name))))

    def _unknown_names(self, unknown: set[str]) -> Iterator[Violation]:
        """Facts that are not in the table, and sites in ``only`` and ``skip`` that the program does not have."""
        for step, pass_ in enumerate(self.passes):
            for name in sorted(_named_facts(pass_) & unknown):
                near = difflib.get_close_matches(name, facts.names(), 1)
                fix = f"did you mean {near[0]!r}?" if near else "declare it with tersor.passes.facts.fact"
                yield Violation(
                    "unknown", self.label(step), f"names the fact {name!r}, which is not declared", fix
                )
            try:
                if self.program is not None:
                    pass_.select(self.program)
            except InputError as error:
                yield Violation("unknown", self.label(step), f"works on sites: {error.what}", error.fix or "")

    def label(self, step: int) -> str:
        return f"{step + 1}. {self.passes[step].name}"

    def _from_the_start(self, fact: Fact) -> list[_Holder]:
        if self.program is None:
            return [_Holder(None, None)] if fact.at_capture else []
        if fact.site is None:
            return [_Holder(None, None)] if facts.holds(fact.name, self.program, self.records) else []
        return [_Holder(None, facts.holds_at(fact.name, self.program))]

    def _places(self, step: int, fact: Fact) -> set[Place] | None:
        if self.program is None or fact.site is None:
            return None
        try:
            return facts.relevant(self.passes[step], fact, self.program)
        except InputError:  # reported by _unknown_names
            return set()

    def _meets(self, step: int, fact: Fact, holder: _Holder) -> bool:
        """Whether a holder's places and a pass's certainly overlap."""
        if holder.step is None and holder.places is None:
            return True
        places = self._places(step, fact)
        if places is not None and holder.places is not None:
            return bool(places & holder.places)
        return _overlap(self.passes[step], self.passes[holder.step], fact)

    def _required(self, step: int, fact: Fact) -> Iterator[Violation]:
        holders = [h for h in self.held[fact.name] if self._meets(step, fact, h)]
        places = self._places(step, fact)
        if places is None:
            satisfied = bool(holders)
        else:
            satisfied = places <= set().union(*(h.places or set() for h in holders))
        if satisfied:
            return
        ended, later = self.ended.get(fact.name), self._later_provider(step, fact)
        if ended is not None:
            yield Violation(
                "order", self.label(step), f"needs {fact.name!r}, which {self.label(ended)} ends before it",
                f"move {self.passes[step].name} before {self.passes[ended].name}",
            )  # fmt: skip
        elif later is not None:
            yield Violation(
                "order", self.label(step), f"needs {fact.name!r}, which only {self.label(later)} gives, after it",
                f"move {self.passes[step].name} after {self.passes[later].name}",
            )  # fmt: skip
        else:
            givers = [name for name, cls in registry.passes().items() if fact.name in cls.provides]
            yield Violation(
                "missing", self.label(step), f"needs {fact.name!r} ({fact.doc.splitlines()[0]}), which nothing gives",
                f"put {' or '.join(givers)} before it" if givers else f"remove {self.passes[step].name}",
            )  # fmt: skip

    def _forbidden(self, step: int, fact: Fact) -> Iterator[Violation]:
        pass_ = self.passes[step]
        for holder in self.held[fact.name]:
            if not self._meets(step, fact, holder):
                continue
            if holder.step is None and fact.site is not None:
                continue  # the pass leaves these sites out (`facts.barred`)
            if holder.step is None:
                yield Violation(
                    "forbidden", self.label(step), f"forbids {fact.name!r}, which the program is already",
                    f"remove {pass_.name}",
                )  # fmt: skip
            elif fact.name in pass_.provides and fact.name in self.passes[holder.step].forbids:
                yield Violation(
                    "forbidden", self.label(step), f"forbids {fact.name!r}, which {self.label(holder.step)} gives",
                    "keep one of the two, or give them different sites with only= and skip=",
                )  # fmt: skip
            else:
                giver = self.label(holder.step)
                yield Violation(
                    "order", self.label(step), f"forbids {fact.name!r}, which {giver} gives before it",
                    f"move {pass_.name} before {self.passes[holder.step].name}",
                )  # fmt: skip

    def _end_facts(self, step: int) -> Iterator[Violation]:
        """Ends what the pass invalidates; to undo the work of an earlier pass is a violation."""
        pass_ = self.passes[step]
        for name, holders in self.held.items():
            fact = facts.get(name)
            recorded = fact.site is None and fact.program is None
            if not (recorded or name in pass_.invalidates):
                continue
            kept = []
            for holder in holders:
                if not self._meets(step, fact, holder):
                    kept.append(holder)
                    continue
                self.ended[name] = step
                places = self._places(step, fact)
                if places is not None and holder.places is not None and (rest := holder.places - places):
                    kept.append(_Holder(holder.step, rest))
                given_again = any(name in p.provides for p in self.passes[step:])
                if (
                    holder.step is not None
                    and not recorded
                    and name not in pass_.requires
                    and not given_again
                ):
                    yield Violation(
                        "order", self.label(step), f"ends {name!r}, the work of {self.label(holder.step)}",
                        f"move {pass_.name} before {self.passes[holder.step].name}",
                    )  # fmt: skip
            self.held[name] = kept

    def _later_provider(self, step: int, fact: Fact) -> int | None:
        later = range(step + 1, len(self.passes))
        return next((i for i in later if fact.name in self.passes[i].provides), None)


def _named_facts(pass_: Pass) -> set[str]:
    return {*pass_.requires, *pass_.forbids, *pass_.provides, *pass_.invalidates}


def _overlap(a: Pass, b: Pass, fact: Fact) -> bool:
    """Whether two passes certainly meet at a site, judged by their patterns alone."""
    if fact.site is None:
        return True
    acting = [set(p.acts_on or fact.operations) & set(fact.operations) for p in (a, b)]
    if not acting[0] & acting[1]:
        return False
    for one, other in ((a, b), (b, a)):
        if one.only is not None and set(one.only) <= set(other.skip):
            return False
    return a.only is None or b.only is None or a.only == b.only


def violations(
    passes: Sequence[Pass], program: Program | None = None, records: Records | None = None
) -> list[Violation]:
    """Everything wrong with running these passes in this order.

    Without a program only what is certain for every freshly captured one is found; with it, facts are exact per site.
    """
    return list(_Walk(passes, program, records).violations())


def arranged(groups: Sequence[Sequence[Pass]]) -> list[int]:
    """An order of groups of passes (a single pass is a group of one) that meets their facts.

    Among the orders that do, the one along `STAGES` and, within a stage, as given. A pass without a stage stays
    behind the one it was given behind.

    Returns:
        Indices into ``groups``.

    Raises:
        PipelineError: the facts demand a circle; the message names it.
    """
    graph = nx.DiGraph()
    graph.add_nodes_from(range(len(groups)))
    for i, first in enumerate(groups):
        for j, second in enumerate(groups):
            if i != j and (reason := _must_precede(first, second)):
                graph.add_edge(i, j, reason=reason)
    stage, stages = -1, []
    for group in groups:
        stage = max((STAGES.index(p.stage) for p in group if p.stage), default=stage)
        stages.append(stage)
    try:
        return list(nx.lexicographical_topological_sort(graph, key=lambda i: (stages[i], i)))
    except nx.NetworkXUnfeasible:
        circle = [graph.edges[i, j]["reason"] for i, j in nx.find_cycle(graph)]
        raise PipelineError(
            "no order of these passes is right",
            why="; ".join(circle),
            fix="remove one of them, or give them other sites",
        ) from None


def _must_precede(first: Sequence[Pass], second: Sequence[Pass]) -> str | None:
    """Why ``first`` comes before ``second``, if it must."""
    for a in first:
        for b in second:
            for name in sorted(a.provides & b.requires):
                return f"{b.name} needs {name!r}, which {a.name} gives"
            for name in sorted(a.forbids & b.provides):
                if _overlap(a, b, facts.get(name)) and not (name in a.provides and name in b.forbids):
                    return f"{a.name} forbids {name!r}, which {b.name} gives"
            for name in sorted((a.invalidates & b.provides) - a.requires - a.provides):
                if _overlap(a, b, facts.get(name)):
                    return f"{a.name} ends {name!r}, which {b.name} gives"
    return None
