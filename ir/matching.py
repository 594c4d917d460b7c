"""Patterns and rewrite rules over dialect operations.

A pattern is a Python expression. `P` makes one per operation; positional arguments are operand patterns,
keyword arguments constrain attributes::

    x = P.any("x")
    rms = P.mul(x, P.rsqrt(P.add(P.mean(P.pow(x, 2), dims=(-1,), keepdim=True), P.number("eps"))))
    Rule("rms_norm", rms, lambda build, m: build.rms_norm(m["x"], eps=m["eps"]))

The same name captured twice must be the same value; operands of commutative operations match in either order;
`apply_rules` runs rules to a fixpoint and says for each near-match why its rule did not fire.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import fx

from tersor.errors import ProgramError
from tersor.ir.dialect import ops
from tersor.ir.program import Builder, Function
from tersor.ir.verifier import describe

COMMUTATIVE = frozenset({"add", "mul", "maximum", "minimum", "eq", "ne", "logical_and", "logical_or"})
MAX_SWEEPS = 100


@dataclass
class Match:
    """A place where a pattern fits.

    Attributes:
        function: the function matched in.
        root: the node whose value the pattern describes.
        captures: named values: nodes, numbers or None.
        nodes: every operation node that the pattern covers, the root included.
    """

    function: Function
    root: fx.Node
    captures: dict[str, Any] = field(default_factory=dict)
    nodes: tuple[fx.Node, ...] = ()

    def __getitem__(self, name: str) -> Any:
        return self.captures[name]

    def __contains__(self, name: str) -> bool:
        return name in self.captures

    def value(self, name: str) -> Any:
        """The metadata (`Value`) of a captured node."""
        return self.captures[name].meta["value"]

    def parameter(self, name: str) -> Any:
        """The tensor of a captured parameter; None when the capture is something else."""
        return self.function.parameter(self.captures[name])

    def bound(self, name: str, value: Any) -> Match | None:
        """This match with one more capture; None when the name holds another value already."""
        if name in self.captures:
            return self if _same(self.captures[name], value) else None
        return Match(self.function, self.root, {**self.captures, name: value}, self.nodes)

    def covering(self, node: fx.Node) -> Match:
        return Match(self.function, self.root, self.captures, (*self.nodes, node))


def is_call(value: Any, *names: str) -> bool:
    """Whether a value is an operation node (of one of the named operations, where names are given)."""
    return (
        isinstance(value, fx.Node)
        and value.op == "call_function"
        and (not names or value.target.name in names)
    )


def is_number(value: Any) -> bool:
    """Whether an operand is a Python number (booleans are not)."""
    return isinstance(value, int | float) and not isinstance(value, bool)


class Search:
    """One attempt to match; remembers how far it came, to explain a near-match."""

    def __init__(self) -> None:
        self.depth, self.reason = -1, ""

    def fail(self, match: Match, reason: str) -> None:
        if len(match.nodes) > self.depth:
            self.depth, self.reason = len(match.nodes), reason


class Pattern(ABC):
    """Base of all patterns: `matches` yields every way in which a value fits."""

    def named(self, name: str) -> Pattern:
        """The same pattern, capturing the value it fits as ``name``."""
        return Named(self, name)

    @abstractmethod
    def matches(self, value: Any, match: Match, search: Search) -> Iterator[Match]:
        """Every way in which ``value`` fits, as extensions of ``match``."""

    @cached_property
    def calls(self) -> int:
        """Operations that the pattern needs at least."""
        return 0


class Named(Pattern):
    def __init__(self, inner: Pattern, name: str):
        self.inner, self.name = inner, name

    @cached_property
    def calls(self) -> int:
        return self.inner.calls

    def matches(self, value: Any, match: Match, search: Search) -> Iterator[Match]:
        for inner in self.inner.matches(value, match, search):
            if bound := inner.bound(self.name, value):
                yield bound


class Leaf(Pattern):
    """Any value that a predicate accepts."""

    def __init__(self, accepts: Callable[[Any, Function], bool], what: str):
        self.accepts, self.what = accepts, what

    def matches(self, value: Any, match: Match, search: Search) -> Iterator[Match]:
        if self.accepts(value, match.function):
            yield match
        else:
            search.fail(match, f"{_show(value)} is not {self.what}")


class Call(Pattern):
    """A node of one of the named operations with fitting operands and attributes.

    Operands that the pattern leaves out must be absent or None, unless it ends with ``...``. An attribute is
    given as a value to equal or a predicate to hold; those not mentioned are free.
    """

    def __init__(self, names: Sequence[str], operands: Sequence[Any], attributes: dict[str, Any]):
        for name in names:
            ops.get(name)  # a misspelt pattern would never fire
        self.names, self.attributes = tuple(names), attributes
        self.open = bool(operands) and operands[-1] is ...
        self.operands = tuple(as_pattern(o) for o in (operands[:-1] if self.open else operands))

    @cached_property
    def calls(self) -> int:
        return 1 + sum(o.calls for o in self.operands)

    def matches(self, value: Any, match: Match, search: Search) -> Iterator[Match]:
        if not is_call(value, *self.names):
            search.fail(match, f"{_show(value)} is not {' or '.join(self.names)}")
            return
        for name, wanted in self.attributes.items():
            actual = value.kwargs.get(name, value.target.attributes.get(name))
            if not (wanted(actual) if callable(wanted) else _same(wanted, actual)):
                search.fail(match, f"{_show(value)} has {name}={actual}")
                return
        operands = value.args
        rest = () if self.open else operands[len(self.operands) :]
        if len(operands) < len(self.operands) or any(o is not None for o in rest):
            search.fail(match, f"{_show(value)} has other operands than the pattern")
            return
        yield from _in_order(self.operands, operands, match.covering(value), search)
        if value.target.name in COMMUTATIVE:
            yield from _in_order(self.operands, operands[1::-1], match.covering(value), search)


def _in_order(
    patterns: Sequence[Pattern], values: Sequence[Any], match: Match, search: Search
) -> Iterator[Match]:
    """Every way in which each pattern fits the value at its position."""
    if not patterns:
        yield match
        return
    for first in patterns[0].matches(values[0], match, search):
        yield from _in_order(patterns[1:], values[1:], first, search)


class Together(Pattern):
    """A variadic operand: a tuple whose members fit in order."""

    def __init__(self, members: Sequence[Any]):
        self.members = tuple(as_pattern(p) for p in members)

    @cached_property
    def calls(self) -> int:
        return sum(p.calls for p in self.members)

    def matches(self, value: Any, match: Match, search: Search) -> Iterator[Match]:
        if isinstance(value, list | tuple) and len(value) == len(self.members):
            yield from _in_order(self.members, value, match, search)
        else:
            search.fail(match, f"{_show(value)} is not {len(self.members)} values")


class OneOf(Pattern):
    """The first alternatives that fit, in order."""

    def __init__(self, alternatives: Sequence[Any]):
        self.alternatives = tuple(as_pattern(a) for a in alternatives)

    @cached_property
    def calls(self) -> int:
        return min(a.calls for a in self.alternatives)

    def matches(self, value: Any, match: Match, search: Search) -> Iterator[Match]:
        for alternative in self.alternatives:
            yield from alternative.matches(value, match, search)


class Through(Pattern):
    """A pattern under any number of one-operand operations of the given names (casts, reshapes, ...)."""

    def __init__(self, names: Sequence[str], inner: Any):
        self.names, self.inner = frozenset(names), as_pattern(inner)

    @cached_property
    def calls(self) -> int:
        return self.inner.calls

    def matches(self, value: Any, match: Match, search: Search) -> Iterator[Match]:
        yield from self.inner.matches(value, match, search)
        while is_call(value, *self.names):
            match, value = match.covering(value), value.args[0]
            yield from self.inner.matches(value, match, search)


class _Patterns:
    """`P.mul(a, b)`, `P.softmax(x, dim=-1)` and the helpers below."""

    def __getattr__(self, name: str) -> Callable[..., Call]:
        return lambda *operands, **attributes: Call((name,), operands, attributes)

    def any(self, name: str | None = None, where: Callable[[fx.Node], bool] | None = None) -> Pattern:
        """Any node (that ``where`` accepts)."""
        leaf = Leaf(lambda v, _: isinstance(v, fx.Node) and (where is None or where(v)), "a fitting value")
        return leaf.named(name) if name else leaf

    def optional(self, name: str) -> Pattern:
        """Any node, number or None."""
        return Leaf(lambda v, _: True, "anything").named(name)

    def parameter(self, name: str) -> Pattern:
        """A parameter of the program."""
        return Leaf(lambda v, _: isinstance(v, fx.Node) and v.op == "get_attr", "a parameter").named(name)

    def number(self, name: str) -> Pattern:
        """A Python number."""
        return Leaf(lambda v, _: is_number(v), "a number").named(name)

    def op(self, names: Sequence[str], *operands: Any, **attributes: Any) -> Pattern:
        """A node of any of several operations."""
        return Call(tuple(names), operands, attributes)

    def one_of(self, *alternatives: Any) -> Pattern:
        return OneOf(alternatives)

    def sequence(self, *members: Any) -> Pattern:
        """The values of a variadic operand, in order."""
        return Together(members)

    def through(self, names: Sequence[str], inner: Any) -> Pattern:
        """``inner``, possibly under operations of these names."""
        return Through(tuple(names), inner)


P = _Patterns()


def as_pattern(x: Any) -> Pattern:
    """Numbers and None stand for themselves."""
    if isinstance(x, Pattern):
        return x
    return Leaf(lambda value, _: _same(value, x), repr(x))


@dataclass(frozen=True)
class Rule:
    """One rewrite: where ``pattern`` fits and ``check`` finds no objection, ``rewrite`` replaces the root.

    Attributes:
        name: shown in reports and written into ``made_by`` of new nodes.
        pattern: what to look for.
        rewrite: ``rewrite(build, match)`` emits new nodes before the root and returns the one that replaces it;
            None when it has changed the function itself.
        check: None when the rule may fire, else the reason why not.
    """

    name: str
    pattern: Pattern
    rewrite: Callable[[Builder, Match], fx.Node | None]
    check: Callable[[Match], str | None] = lambda match: None

    @property
    def roots(self) -> tuple[str, ...] | None:
        """Names of the operations that the pattern can start at; None for any."""
        inner = self.pattern
        while isinstance(inner, Named):
            inner = inner.inner
        return inner.names if isinstance(inner, Call) else None


@dataclass(frozen=True)
class Event:
    """A rule at a place: what it did, or why it did nothing."""

    rule: str
    place: str
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.rule} at {self.place}" + (f": {self.reason}" if self.reason else "")


@dataclass
class RuleReport:
    """What rules did to a function, and the near-matches they left alone with the reasons."""

    fired: list[Event] = field(default_factory=list)
    skipped: list[Event] = field(default_factory=list)

    def __bool__(self) -> bool:
        """Whether anything changed."""
        return bool(self.fired)

    def extend(self, other: RuleReport) -> None:
        self.fired += other.fired
        self.skipped += other.skipped

    def counts(self) -> dict[str, int]:
        """How often each rule fired."""
        totals: dict[str, int] = defaultdict(int)
        for event in self.fired:
            totals[event.rule] += 1
        return dict(totals)


def find(pattern: Pattern, function: Function, node: fx.Node) -> Match | None:
    """The first way in which ``pattern`` fits at ``node``."""
    return next(pattern.matches(node, Match(function, node), Search()), None)


def apply_rules(function: Function, rules: Sequence[Rule]) -> RuleReport:
    """Applies rules until none fires; new nodes take place, site and provenance of what they replace.

    Raises:
        ProgramError: the rules undo each other and never settle.
    """
    report = RuleReport()
    for _ in range(MAX_SWEEPS):
        before, skipped = len(report.fired), []
        for node in function.nodes:
            for rule in rules:
                if node._erased or node.op != "call_function":
                    break
                if rule.roots is None or node.target.name in rule.roots:
                    _try(rule, function, node, report.fired, skipped)
        if len(report.fired) == before:
            report.skipped = skipped
            return report
    raise ProgramError(
        "rewrite rules do not settle",
        why=f"after {MAX_SWEEPS} sweeps these still fire: {sorted({e.rule for e in report.fired[before:]})}",
        fix="make sure that no rule undoes another",
    )


def _try(rule: Rule, function: Function, node: fx.Node, fired: list[Event], skipped: list[Event]) -> None:
    search, reason = Search(), ""
    for match in rule.pattern.matches(node, Match(function, node), search):
        reason = rule.check(match) or ""
        if not reason:
            place = describe(node)
            new = rule.rewrite(function.builder(before=node, made_by=rule.name), match)
            if new is not None:
                function.replace(node, new)
            fired.append(Event(rule.name, place))
            return
    # A near-match: the structure fits but the check objects, or most of a larger pattern was there.
    if reason or search.depth > max(1, rule.pattern.calls // 2):
        skipped.append(Event(rule.name, describe(node), reason or search.reason))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, fx.Node) or isinstance(b, fx.Node):
        return a is b
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, float) or isinstance(b, float):
        # Constants such as sqrt(2/pi) reach a program with different last digits.
        return is_number(a) and is_number(b) and (a == b or math.isclose(a, b, rel_tol=1e-6))
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return tuple(a) == tuple(b)
    return a == b


def _show(value: Any) -> str:
    if isinstance(value, fx.Node):
        return f"%{value.name} ({value.target.name if is_call(value) else value.op})"
    return repr(value)
