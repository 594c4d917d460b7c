"""What no pass may break, and what it has to keep of what it declares. Each check answers with the fault, or None."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

from tersor.ir import Function, Program
from tersor.ir.site import select
from tersor.passes import facts
from tersor.passes.base import Finding, Pass
from tersor.passes.facts import Place, Records
from tersor.passes.sites import places

Present = Set[tuple[str, Place]]


@dataclass(frozen=True)
class Fault:
    """What is wrong with what a pass did, and what its author should do."""

    what: str
    fix: str | None = None


def changed_signature(before: Program, after: Program) -> Fault | None:
    """A function is gone, or has other inputs, dimensions or outputs."""
    for name, old in before.functions.items():
        new = after.functions.get(name)
        if new is None:
            return Fault(f"the function {name!r} is gone")
        for what, was, is_now in (
            ("inputs", old.inputs, new.inputs),
            ("dimensions", old.dims, new.dims),
            ("outputs", _results(old), _results(new)),
            ("states", old.states, new.states),
            ("updated states", _updates(old), _updates(new)),
        ):
            if was != is_now:
                return Fault(f"the {what} of {name!r} changed from {_show(was)} to {_show(is_now)}")
    return None


def broken_promise(
    pass_: Pass, after: Program, has: Present, sites: Set[str], records: Records
) -> Fault | None:
    """A fact in ``provides`` does not hold, at one of the ``sites`` that the pass changed or for the program."""
    for name in sorted(pass_.provides):
        fact = facts.get(name)
        if fact.site is None:
            missing = set() if facts.holds(name, after, records) else {"the program"}
        else:
            places = {place for place in facts.relevant(pass_, fact, after) if place[1] in sites}
            missing = {site for function, site in places if (name, (function, site)) not in has}
        if missing:
            return Fault(f"it provides {name!r}, which does not hold at {', '.join(sorted(missing))}")
    return None


def lost_facts(pass_: Pass, after: Program, had: Present, has: Present) -> Fault | None:
    """A fact that is not in ``invalidates`` held before and does not any more, at a site that is still there."""
    still_there = {("", "")} | places(after)
    lost = sorted(
        f"{name!r} at {place[1] or 'the program'}"
        for name, place in had - has
        if name not in pass_.invalidates and place in still_there
    )
    if not lost:
        return None
    return Fault(f"it ended the fact {'; '.join(lost[:5])}", "name the fact in invalidates, or keep it")


def idle_patterns(pass_: Pass, program: Program) -> list[Finding]:
    """The globs of ``only`` and ``skip`` that fit no site."""
    return [
        Finding(pattern, f"no site of the program fits this pattern of {option}=")
        for option, patterns in (("only", pass_.only or ()), ("skip", pass_.skip))
        for pattern in patterns
        if not select(program, (pattern,))
    ]


def _results(function: Function) -> dict[str, object]:
    return dict(zip(function.outputs, (node.meta["value"] for node in function.results), strict=True))


def _updates(function: Function) -> dict[str, object]:
    return {name: node.meta["value"] for name, node in function.updates.items()}


def _show(signature: dict) -> str:
    return ", ".join(f"{name}: {value}" for name, value in signature.items()) or "none"
