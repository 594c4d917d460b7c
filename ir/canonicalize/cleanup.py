"""What computes nothing disappears: no-op casts, reshapes, expands, slices, additions of 0, and values made twice."""

from __future__ import annotations

from typing import Any

from torch import fx

from tersor.ir.matching import Match, P, Rule, is_call
from tersor.ir.opset.rules import broadcast
from tersor.ir.program import Builder, Function
from tersor.ir.value import Value

ELEMENTWISE_BINARY = ("add", "sub", "mul", "div", "maximum", "minimum", "pow", "where", "logical_and", "logical_or",
                      "eq", "ne", "lt", "le", "gt", "ge")  # fmt: skip


def remove_dead(function: Function) -> int:
    """Removes every node that no result depends on; returns how many. Inputs stay."""
    return function.erase_dead(*reversed(function.nodes))


def merge_duplicates(function: Function) -> int:
    """Common subexpressions: of equal operations on equal operands the first stays; returns how many went."""
    seen: dict[Any, fx.Node] = {}
    gone = 0
    for node in function.nodes:
        if node.op not in ("call_function", "get_attr"):
            continue
        key = (node.target, node.args, tuple(sorted(node.kwargs.items(), key=lambda item: item[0])), _types(node))
        first = seen.setdefault(key, node)
        if first is not node:
            function.replace(node, first)
            gone += 1
    return gone


def _types(node: fx.Node) -> tuple[type, ...]:
    """1, 1.0 and True are equal keys but different operands."""
    return tuple(type(a) for a in (*node.args, *node.kwargs.values()))


def _unchanged(m: Match) -> str | None:
    return None if m["x"].meta["value"] == m.root.meta["value"] else "it changes dtype or shape"


def _same_shape(m: Match) -> str | None:
    return None if m["x"].meta["value"].shape == m.root.meta["value"].shape else "it changes the shape"


def _first(build: Builder, m: Match) -> fx.Node:
    return m["x"]


def _slices_compose(m: Match) -> str | None:
    inner = m["inner"]
    if (m.root.kwargs.get("step", 1), inner.kwargs.get("step", 1)) != (1, 1):
        return "a slice has a step"
    return None if _axis(m.root) == _axis(inner) else "they cut different axes"


def _compose_slices(build: Builder, m: Match) -> fx.Node:
    inner, axis = m["inner"], _axis(m.root)
    start = inner.kwargs.get("start", 0) + m.root.kwargs.get("start", 0)
    return build.slice(m["x"], dim=axis, start=start, end=start + m.root.meta["value"].shape[axis])


def _axis(node: fx.Node) -> int:
    return node.kwargs["dim"] % node.meta["value"].rank


def _broadcasts_alone(m: Match) -> str | None:
    return None if _without_expansion(m) else "an operand needs its expansion"


def _without_expansion(m: Match) -> list[Any] | None:
    """The operands without expands, and without reshapes that only prepend axes of size 1; None if no different."""
    operands = list(m.root.args)
    for i, operand in enumerate(operands):
        for plain in _narrower(operand):
            shapes = [o.meta["value"].shape for o in (*operands[:i], plain, *operands[i + 1 :]) if isinstance(o, fx.Node)]
            if broadcast(*shapes) == m.root.meta["value"].shape:
                operands[i] = plain
                break
    return operands if operands != list(m.root.args) else None


def _narrower(operand: Any) -> list[fx.Node]:
    if is_call(operand, "expand"):
        return [operand.args[0]]
    if is_call(operand, "reshape"):
        inner: Value = operand.args[0].meta["value"]
        if operand.kwargs["shape"] == (1,) * (operand.meta["value"].rank - inner.rank) + inner.shape:
            return [operand.args[0]]
    return []


def _drop_expansion(build: Builder, m: Match) -> fx.Node:
    return build.emit(m.root.target, *_without_expansion(m), **m.root.kwargs)


_X = P.any("x")

RULES = (
    # cast(x, float32) of a float32 x  ->  x;  the same for reshape, expand, slice, permute
    Rule("cleanup.no_op", P.op(("cast", "reshape", "expand", "slice"), _X), _first, _unchanged),
    # x + 0, x * 1, x - 0, x / 1, x ** 1  ->  x
    Rule("cleanup.add_zero", P.one_of(P.add(_X, 0), P.sub(_X, 0), P.add(_X, 0.0), P.sub(_X, 0.0)), _first, _unchanged),
    Rule("cleanup.times_one", P.one_of(P.mul(_X, 1), P.div(_X, 1), P.pow(_X, 1)), _first, _unchanged),
    # not not x  ->  x
    Rule("cleanup.not_not", P.logical_not(P.logical_not(_X)), _first, _unchanged),
    # slice(slice(x))  ->  slice(x)
    Rule("cleanup.slice_of_slice", P.slice(P.slice(_X).named("inner")), _compose_slices, _slices_compose),
    # expand(expand(x))  ->  expand(x)
    Rule("cleanup.expand_of_expand", P.expand(P.expand(_X)), lambda b, m: b.expand(m["x"], shape=m.root.kwargs["shape"])),
    # x + expand(y)  ->  x + y where the sum has the same shape
    Rule("cleanup.broadcast", P.op(ELEMENTWISE_BINARY, ...), _drop_expansion, _broadcasts_alone),
)
