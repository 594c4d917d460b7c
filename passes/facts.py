"""Facts: what can be said of a program, so that passes can name what they need, give and end.

A fact is a predicate computed from the program, so an imported or reloaded program has it too. Most hold *per site*
(``quantized`` at one linear layer, not at another); some hold for the program as a whole. What cannot be computed,
such as calibration statistics, is *recorded* for one program by its digest and lapses as soon as the program changes.

The table is open::

    @fact("mylib.clipped", operations=("linear",))
    def clipped(function, node):
        '''The weights lie in [-1, 1].'''
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from tersor.errors import PipelineError
from tersor.ir import Function, Parameter, Program
from tersor.ir.matching import is_call
from tersor.ir.value import DTYPES
from tersor.passes.sites import names as site_names

if TYPE_CHECKING:
    from tersor.passes.base import Pass

SitePredicate = Callable[[Function, fx.Node], bool]
ProgramPredicate = Callable[[Program], bool]
Place = tuple[str, str]
"""A function's name and the name of a site in it."""


@dataclass(frozen=True)
class Fact:
    """One entry of the table.

    Attributes:
        name: what passes call it; third parties prefix theirs.
        doc: what it says, in a sentence.
        site: the predicate for one node; None where the fact is about the whole program or recorded.
        program: the predicate for a program; None where the fact is per site or recorded.
        operations: the operations whose nodes the per-site predicate makes sense for.
        at_capture: it holds for every freshly captured program.
    """

    name: str
    doc: str
    site: SitePredicate | None = None
    program: ProgramPredicate | None = None
    operations: tuple[str, ...] = ()
    at_capture: bool = False


@dataclass
class Records:
    """Facts that cannot be computed, each with its value and the digest of the program it was found on."""

    _entries: dict[tuple[str, str], Any] = field(default_factory=dict)

    def put(self, name: str, program: Program, value: Any = True) -> None:
        """Records a fact of exactly this program.

        Raises:
            PipelineError: the table has no recorded fact of that name.
        """
        fact = get(name)
        if fact.site or fact.program:
            raise PipelineError(f"fact {name!r} is computed from the program; it cannot be recorded")
        self._entries[name, program.digest()] = value

    def get(self, name: str, program: Program) -> Any:
        """The value recorded for exactly this program; None when there is none."""
        return self._entries.get((name, program.digest()))


_table: dict[str, Fact] = {}


def fact(name: str, *, operations: Iterable[str]) -> Callable[[SitePredicate], SitePredicate]:
    """Adds a per-site fact about nodes of these operations; the function's docstring says what it means."""

    def add(predicate: SitePredicate) -> SitePredicate:
        _add(Fact(name, inspect.getdoc(predicate) or "", site=predicate, operations=tuple(operations)))
        return predicate

    return add


def program_fact(name: str, *, at_capture: bool = False) -> Callable[[ProgramPredicate], ProgramPredicate]:
    """Adds a fact about whole programs; the function's docstring says what it means."""

    def add(predicate: ProgramPredicate) -> ProgramPredicate:
        _add(Fact(name, inspect.getdoc(predicate) or "", program=predicate, at_capture=at_capture))
        return predicate

    return add


def recorded_fact(name: str, doc: str) -> Fact:
    """Adds a fact that passes record (`Records`) because it cannot be computed."""
    return _add(Fact(name, doc))


def get(name: str) -> Fact:
    """The fact of that name.

    Raises:
        PipelineError: there is none.
    """
    if name not in _table:
        near = difflib.get_close_matches(name, _table, 1)
        raise PipelineError(
            f"there is no fact {name!r}",
            why=f"known facts: {', '.join(sorted(_table))}",
            fix=f"did you mean {near[0]!r}?" if near else "declare it with tersor.passes.facts.fact",
        )
    return _table[name]


def names() -> list[str]:
    """Names of all facts."""
    return list(_table)


def known() -> list[Fact]:
    """All facts, in order of declaration."""
    return list(_table.values())


def _add(new: Fact) -> Fact:
    if new.name in _table:
        raise PipelineError(f"fact {new.name!r} is declared twice", fix="prefix it with your package's name")
    if not new.doc:
        raise PipelineError(f"fact {new.name!r} says nothing", fix="give the predicate a docstring")
    _table[new.name] = new
    return new


# -- asking


def holds_at(name: str, program: Program) -> set[Place]:
    """The sites at which a per-site fact holds."""
    found = get(name)
    if found.site is None:
        return set()
    named = site_names(program)
    return {
        (function.name, named[node])
        for function in program.functions.values()
        for node in function.calls(*found.operations)
        if found.site(function, node)
    }


def holds(name: str, program: Program, records: Records | None = None) -> bool:
    """Whether a fact about the whole program, or a recorded one, holds."""
    found = get(name)
    if found.program is not None:
        return found.program(program)
    return records is not None and records.get(name, program) is not None


@dataclass(frozen=True)
class Unmet:
    """A requirement that a program does not meet: a required fact missing, or a forbidden one present."""

    fact: str
    required: bool
    sites: tuple[str, ...]

    def __str__(self) -> str:
        where = f" at {_some(self.sites)}" if self.sites else ""
        return (
            f"needs {self.fact!r}{where}" if self.required else f"forbids {self.fact!r}, which holds{where}"
        )


def unmet(pass_: Pass, program: Program, records: Records | None = None) -> list[Unmet]:
    """What of a pass's ``requires`` and ``forbids`` this program does not meet, at the sites the pass selects.

    A forbidden fact about single sites is no obstacle: the pass leaves those sites out (`barred`).
    """
    found = []
    for name, required in [
        *((n, True) for n in sorted(pass_.requires)),
        *((n, False) for n in sorted(pass_.forbids)),
    ]:
        subject = get(name)
        if subject.site is None:
            if holds(name, program, records) is not required:
                found.append(Unmet(name, required, ()))
            continue
        if not required:
            continue
        if wrong := relevant(pass_, subject, program) - holds_at(name, program):
            found.append(Unmet(name, required, tuple(sorted(site for _, site in wrong))))
    return found


def barred(pass_: Pass, program: Program) -> dict[str, str]:
    """The selected sites at which a fact holds that the pass forbids, each with that fact's name."""
    found = {}
    for name in sorted(pass_.forbids):
        subject = get(name)
        if subject.site is not None:
            places = relevant(pass_, subject, program) & holds_at(name, program)
            found |= {site: name for _, site in places}
    return dict(sorted(found.items()))


def relevant(pass_: Pass, subject: Fact, program: Program) -> set[Place]:
    """The selected sites whose operation the per-site fact is about."""
    operations = [o for o in subject.operations if not pass_.acts_on or o in pass_.acts_on]
    if not operations:
        return set()
    named = site_names(program)
    return {(function.name, named[node]) for function, node in pass_.select(program, *operations)}


def present(program: Program) -> Iterator[tuple[str, Place]]:
    """Every computed fact that holds, with the place; facts about the whole program have the place ("", "")."""
    for subject in known():
        if subject.program is not None and subject.program(program):
            yield subject.name, ("", "")
        for place in holds_at(subject.name, program):
            yield subject.name, place


def _some(sites: tuple[str, ...], limit: int = 5) -> str:
    more = f" and {len(sites) - limit} more" if len(sites) > limit else ""
    return ", ".join(sites[:limit]) + more


# -- the facts that Tersor knows


@program_fact("static")
def static(program: Program) -> bool:
    """No dimension varies from call to call."""
    return not any(function.dims for function in program.functions.values())


_WEIGHTED = ("linear", "integer_linear", "grouped_integer_linear", "conv1d", "conv2d", "embedding")


@fact("quantized", operations=_WEIGHTED)
def quantized(function: Function, node: fx.Node) -> bool:
    """The weights are stored as integers."""
    constants = _constants(node.args[1])
    return bool(constants) and any(
        not DTYPES[c.meta["value"].dtype].is_floating_point and c.meta["value"].dtype != "bool"
        for c in constants
    )


@fact("masked", operations=("linear", "integer_linear", "grouped_integer_linear"))
def masked(function: Function, node: fx.Node) -> bool:
    """At most two of every four consecutive input channels of the weights are used (2:4 sparsity)."""
    weight = node.args[1]
    if is_call(weight, "dequantize"):
        codes, _, zero = (*weight.args, None)[:3]
        if zero is not None:  # a code of 0 then stands for something else
            return False
        weight = codes
    constants = _constants(weight)
    return len(constants) == 1 and _two_of_four(function.parameters[constants[0].target])


@fact("factorized", operations=("linear",))
def factorized(function: Function, node: fx.Node) -> bool:
    """It is the second of two linear layers, without a bias between, that replace a larger one."""
    inner = node.args[0]
    if (
        inner.op != "call_function"
        or inner.target.name != "linear"
        or len(inner.users) > 1
        or inner.args[2:] not in ((), (None,))
    ):
        return False
    (rank, width), outputs = inner.args[1].meta["value"].shape, node.meta["value"].shape[-1]
    return rank * (width + outputs) < width * outputs


def _constants(operand: Any) -> list[fx.Node]:
    """The parameters that an operand is computed from; empty when it depends on an input."""
    if not isinstance(operand, fx.Node) or operand.op == "placeholder":
        return []
    if operand.op == "get_attr":
        return [operand]
    found = []
    for node in operand.all_input_nodes:
        inner = _constants(node)
        if not inner:
            return []
        found += inner
    return found


def _two_of_four(parameter: Parameter) -> bool:
    weight = parameter.tensor
    if weight.ndim != 2 or weight.shape[1] % 4 or weight.dtype == torch.bool:
        return False
    # most weights are dense: the first rows tell, and no program pays for a full look
    return _groups_hold(weight[:8]) and _groups_hold(weight)


def _groups_hold(weight: torch.Tensor) -> bool:
    return bool(((weight.reshape(-1, 4) != 0).sum(1) <= 2).all())
