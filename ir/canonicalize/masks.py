"""Attention masks as the conjunction of what they say: causal, window, and what is left as booleans.

Models build masks from towers of broadcast comparisons, and often turn them into numbers to add to the scores: 0
where a key is seen, -inf or the smallest float where it is hidden. Here a mask is taken apart into boolean factors;
those that are always true go, the triangle becomes ``causal``, a band becomes ``window``, the rest is one boolean mask.
Numbers that are added besides (ALiBi, relative positions) stay, and the mask is ``where(boolean, numbers, lowest)``
with the number that hid keys before.

A row in which every key is hidden is where the forms differ: with -inf torch gives NaN, with the smallest float the
mean of all values, with booleans 0. Such rows belong to queries that are padding themselves; turning an additive mask
into a boolean one is noted for that reason.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from torch import fx

from tersor.ir.canonicalize.affine import Affine, Positions, Predicate
from tersor.ir.dims import Dim
from tersor.ir.matching import Match, P, Rule, is_call, is_number
from tersor.ir.program import Builder, Function

# exp of a score this far below the others is 0 in every float type,
HIDDEN = -1e4
# also after a product with a number that is no smaller than this.
LEAST_FACTOR = 2**-6

_MOVES = ("expand", "reshape", "permute", "slice")
_STEP: dict[str, Callable[..., float]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv, "neg": operator.neg,
}  # fmt: skip
_LINEAR = tuple(_STEP)


def hides(value: Any) -> bool:
    """Whether a number added to a score, or put in its place, hides the key."""
    if is_call(value, "full", "expand"):
        value = constant(value)
    return is_number(value) and value <= HIDDEN


def constant(value: Any) -> Any:
    """The number that a value is everywhere, when that is written in the graph."""
    while is_call(value, "expand", "reshape", "cast"):
        value = value.args[0]
    return value.kwargs["value"] if is_call(value, "full") else value


@dataclass
class _Factors:
    """What a mask says, factor by factor; ``build`` emits the small changes that taking it apart needs."""

    build: Builder
    function: Function
    booleans: list[fx.Node] = field(default_factory=list)
    added: list[fx.Node] = field(default_factory=list)  # numbers to add where no factor hides the key
    was_additive: bool = False
    lowest: float = float("-inf")  # the number that hides

    def boolean(self, node: fx.Node) -> None:
        if is_call(node, "logical_and"):
            for operand in node.args:
                self.boolean(self.widened(operand, node))
        elif is_call(node, "expand", "reshape", "permute") and _leads_to_conjunction(node.args[0]):
            inner = _Factors(self.build, self.function)
            inner.boolean(node.args[0])
            self.booleans += [self._moved(factor, node) for factor in inner.booleans]
        else:
            self.booleans.append(node)

    def additive(self, node: fx.Node) -> str | None:
        """Takes an additive mask apart into what hides and what is added; a reason when nothing in it hides."""
        self.was_additive = True
        if is_call(node, "add") and all(isinstance(a, fx.Node) for a in node.args):
            reasons = [self.additive(self.widened(a, node)) for a in node.args]
            return reasons[0] and reasons[1]
        if constant(node) == 0:
            return None
        if is_call(node, *_MOVES):
            return self._inner(node, lambda part: self._moved(part, node))
        if is_call(node, "cast"):
            return self._inner(node, lambda part: self.build.cast(part, dtype=node.kwargs["dtype"]))
        if is_call(node, "where"):
            reason = self._choice(node)
        elif is_call(node, *_LINEAR):
            reason = self._arithmetic(node)
        elif node.op == "get_attr":
            reason = self._stored(node)
        else:
            reason = f"it is computed by {node.target.name}" if is_call(node) else "it is an input of numbers"
        if reason:
            self.added.append(node)
        return reason

    def _inner(self, node: fx.Node, change: Callable[[fx.Node], fx.Node]) -> str | None:
        """The operand of a reshape, a cast or a product; ``change`` does to the numbers what the node does."""
        inner = _Factors(self.build, self.function)
        reason = inner.additive(node.args[0])
        if reason:
            self.added.append(node)
            return reason
        self.lowest = max(self.lowest, inner.lowest)
        moves = is_call(node, *_MOVES)
        self.booleans += [self._moved(factor, node) if moves else factor for factor in inner.booleans]
        self.added += [change(part) for part in inner.added]
        return None

    def _choice(self, node: fx.Node) -> str | None:
        condition, x, y = node.args
        if hides(x) != hides(y):
            self.lowest = max(self.lowest, constant(x if hides(x) else y))
        if hides(y) and not hides(x):
            self.boolean(self.widened(condition, node))
            if constant(x) != 0:
                self.additive(self.widened(x, node))
            return None
        if hides(x) and not hides(y):
            self.boolean(self.build.logical_not(self.widened(condition, node)))
            if constant(y) != 0 and not _is_inverse(condition, y):
                self.additive(self.widened(y, node))
            return None
        return "it does not choose between seen and hidden"

    def _arithmetic(self, node: fx.Node) -> str | None:
        """(1 - m) * lowest and its like, or a mask of any kind times a number."""
        line = _line(node)
        if line is not None:
            m, at_zero, at_one = line
            hidden_at = [at_zero <= HIDDEN, at_one <= HIDDEN]
            if sorted(hidden_at) == [False, True] and (at_one if hidden_at[0] else at_zero) == 0:
                if m.meta["value"].is_float:
                    return "it comes from a mask of fractions"
                self.lowest = max(self.lowest, min(at_zero, at_one))
                is_bool = m.meta["value"].dtype == "bool"
                if hidden_at[0]:
                    self.boolean(m if is_bool else self.build.ne(m, 0))
                else:
                    self.boolean(self.build.logical_not(m) if is_bool else self.build.eq(m, 0))
                return None
        if not is_call(node, "mul", "div") or not any(map(is_number, node.args)):
            return f"it is computed by {node.target.name}"
        x, number = node.args if is_number(node.args[1]) else node.args[::-1]
        factor = number if is_call(node, "mul") else 1 / number
        if is_call(node, "div") and not is_number(node.args[1]) or factor < LEAST_FACTOR:
            return "it is a product of other things than (1 - mask) and a very negative number"
        inner = _Factors(self.build, self.function)
        if reason := inner.additive(x):
            return reason
        self.lowest = max(self.lowest, inner.lowest)
        self.booleans += inner.booleans
        self.added += [self.build.mul(part, factor) for part in inner.added]
        return None

    def _stored(self, node: fx.Node) -> str | None:
        table: torch.Tensor = self.function.parameters[node.target].tensor
        hidden = table <= HIDDEN
        if not bool(hidden.any()):
            return "it is a stored table of numbers that hide nothing"
        self.lowest = max(self.lowest, float(table[hidden].max()))
        seen = ~hidden
        for axis in range(seen.ndim):  # one for all heads, where they see the same
            first = seen.narrow(axis, 0, 1)
            seen = first if bool((seen == first).all()) else seen
        self.booleans.append(self.build.parameter(f"{node.target}.seen", seen.clone()))
        rest = table.masked_fill(hidden, 0)
        if bool(rest.any()):
            self.added.append(self.build.parameter(f"{node.target}.added", rest))
        return None

    def widened(self, x: Any, like: fx.Node) -> Any:
        """x with as many axes as ``like``."""
        missing = like.meta["value"].rank - x.meta["value"].rank
        return self.build.reshape(x, shape=(1,) * missing + x.meta["value"].shape) if missing > 0 else x

    def _moved(self, factor: fx.Node, move: fx.Node) -> fx.Node:
        """A factor of the operand of ``move`` as a factor of its result."""
        whole = move.args[0].meta["value"].shape
        if move.target.name == "expand":
            return self.widened(factor, move)
        if move.target.name == "reshape":
            kept = [d for d in whole if d != 1]
            if kept != [d for d in move.kwargs["shape"] if d != 1]:
                factor = self.build.expand(factor, shape=whole)
                return self.build.reshape(factor, shape=move.kwargs["shape"])
            sizes = iter([s for s, w in zip(factor.meta["value"].shape, whole, strict=True) if w != 1])
            return self.build.reshape(
                factor, shape=tuple(1 if d == 1 else next(sizes) for d in move.kwargs["shape"])
            )
        if move.target.name == "slice" and factor.meta["value"].shape[move.kwargs["dim"]] == 1:
            return factor
        return self.build.emit(move.target, factor, **move.kwargs)


def _leads_to_conjunction(node: fx.Node) -> bool:
    while is_call(node, "expand", "reshape", "permute"):
        node = node.args[0]
    return is_call(node, "logical_and")


def _line(node: fx.Node) -> tuple[fx.Node, float, float] | None:
    """The value m behind sums and products with numbers, and what these make of m = 0 and of m = 1."""
    steps = []
    while is_call(node, "cast", *_LINEAR):
        values = [a for a in node.args if isinstance(a, fx.Node)]
        if len(values) != 1 or (is_call(node, "div") and values[0] is not node.args[0]):
            break
        if not is_call(node, "cast"):
            steps.append(node)
        node = values[0]
    ends = [0.0, 1.0]
    for step in reversed(steps):
        ends = [
            _STEP[step.target.name](*(e if isinstance(a, fx.Node) else a for a in step.args)) for e in ends
        ]
    return (node, *ends) if steps else None


def _is_inverse(condition: fx.Node, y: Any) -> bool:
    """where(cast(y, bool), lowest, y) with y = 1 - m: where the condition fails, y is 0."""
    while is_call(condition, "cast"):
        condition = condition.args[0]
    return condition is y or (is_call(condition, "ne") and condition.args[0] is y and condition.args[1] == 0)


# -- what a factor says


def _triangle(difference: Affine, queries: int | Dim, keys: int | Dim) -> bool:
    """i - j + (Tk - Tq) >= 0 over [.., Tq, Tk]."""
    return difference.coefficients == {2: 1, 3: -1} and difference.offset == keys - queries


def _band(difference: Affine, queries: int | Dim, keys: int | Dim) -> int | None:
    """The window w of j - i - (Tk - Tq) + w - 1 >= 0."""
    if difference.coefficients != {2: -1, 3: 1}:
        return None
    window = difference.offset + 1 + (keys - queries)
    return window if isinstance(window, int) and window >= 1 else None


def _factors(m: Match, build: Builder) -> tuple[_Factors, str | None]:
    factors = _Factors(build, m.function)
    mask = m["mask"]
    if mask.meta["value"].dtype == "bool":
        factors.boolean(mask)
        return factors, None
    return factors, factors.additive(mask)


def _can_simplify(m: Match) -> str | None:
    """Tries on scratch nodes; they are removed again."""
    scratch = m.function.builder(before=m.root)
    before = set(m.function.graph.nodes)
    stored = set(m.function.parameters)
    try:
        factors, reason = _factors(m, scratch)
        if reason is not None:
            return f"the additive mask stays: {reason}"
        _, changed = _read(m, factors)
        return None if changed else "nothing to simplify"
    finally:
        m.function.erase_dead(*[n for n in reversed(m.function.nodes) if n not in before])
        for name in set(m.function.parameters) - stored:
            del m.function.parameters[name]


@dataclass
class _Meaning:
    causal: bool
    window: int | None
    left: list[fx.Node]


def _read(m: Match, factors: _Factors) -> tuple[_Meaning, bool]:
    positions = Positions(m.function)
    queries, keys = m.root.args[0].meta["value"].shape[1], m.root.args[1].meta["value"].shape[1]
    meaning = _Meaning(m.root.kwargs.get("causal", False), m.root.kwargs.get("window"), [])
    square = queries == keys
    for factor in factors.booleans:
        predicate = positions.predicate(factor)
        difference = predicate.difference if isinstance(predicate, Predicate) else None
        if difference is not None and difference.at_least_zero(m.function.dims) is True:
            continue
        if difference is not None and square and _triangle(difference, queries, keys):
            meaning.causal = True
        elif difference is not None and square and (window := _band(difference, queries, keys)):
            meaning.window = min(window, meaning.window or window)
        else:
            meaning.left.append(_plain(factors, factor))
    return meaning, (meaning.left, factors.added) != _as_it_stands(m["mask"])


def _as_it_stands(mask: fx.Node) -> tuple[list[Any], list[Any]]:
    """Factors and addends of a mask in the form that `_simplify` gives it."""
    if mask.meta["value"].dtype == "bool":
        return _conjunction(mask), []
    if is_call(mask, "where") and is_number(mask.args[2]) and hides(mask.args[2]):
        return _conjunction(mask.args[0]), _addends(mask.args[1])
    return [], _addends(mask)


def _addends(mask: Any) -> list[Any]:
    if is_call(mask, "add"):
        return [part for operand in mask.args for part in _addends(operand)]
    return [mask]


def _conjunction(mask: fx.Node) -> list[fx.Node]:
    """The factors of a mask as it stands."""
    if is_call(mask, "logical_and"):
        return [factor for operand in mask.args for factor in _conjunction(operand)]
    return [mask]


def _plain(factors: _Factors, factor: fx.Node) -> fx.Node:
    """Without expansions: an attention mask broadcasts by itself, once it has all axes."""
    while is_call(factor, "expand"):
        factor = factors.widened(factor.args[0], factor)
    return factor


def _simplify(build: Builder, m: Match) -> fx.Node:
    factors, _ = _factors(m, build)
    meaning, _ = _read(m, factors)
    mask = reduce(build.logical_and, meaning.left) if meaning.left else None
    if factors.added:
        added = reduce(build.add, factors.added)
        mask = added if mask is None else build.where(mask, added, factors.lowest)
    attributes = {k: v for k, v in m.root.kwargs.items() if k not in ("causal", "window")}
    if meaning.causal:
        attributes["causal"] = True
    if meaning.window is not None:
        attributes["window"] = meaning.window
    result = build.attention(*m.root.args[:3], mask, **attributes)
    if factors.was_additive and meaning.left:
        zero = not factors.added or factors.lowest == float("-inf")
        result.meta["note"] = (
            "what hides keys in its additive mask became boolean: integers other than 0 count as 1, rows that hide "
            f"every key give {'0' if zero else 'the mean of the values they could see'}"
        )
    return result


RULES = (
    # attention(q, k, v, expand(and(full(true), j <= i, reshape(m))))  ->  attention(q, k, v, reshape(m), causal)
    # attention(q, k, v, alibi + where(j <= i and m, 0, -1e9))  ->  attention(q, k, v, where(m, alibi, -1e9), causal)
    Rule("masks.simplify", P.attention(P.any(), P.any(), P.any(), P.any("mask")), _simplify, _can_simplify),
)
