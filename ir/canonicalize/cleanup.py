"""What computes nothing disappears: no-op casts, reshapes, expands, slices, additions of 0, and values made twice."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import fx

from tersor.ir.dims import Dim
from tersor.ir.matching import Match, P, Rule, is_call, is_number
from tersor.ir.opset.rules import broadcast
from tersor.ir.program import Builder, Function
from tersor.ir.value import Value

ELEMENTWISE_BINARY = ("add", "sub", "mul", "div", "maximum", "minimum", "pow", "where", "logical_and", "logical_or",
                      "eq", "ne", "lt", "le", "gt", "ge")  # fmt: skip

# Those that take numbers in place of tensors.
ELEMENTWISE_NUMBER = tuple(n for n in ELEMENTWISE_BINARY if not n.startswith("logical"))


def remove_dead(function: Function, spare: Collection[fx.Node] = ()) -> int:
    """Removes every node that no result depends on; returns how many. Inputs stay, and what ``spare`` names."""
    gone = 0
    for node in reversed(function.nodes):
        if not node.users and node.op in ("call_function", "get_attr") and node not in spare:
            function.graph.erase_node(node)
            gone += 1
    return gone


def merge_duplicates(function: Function, spare: Collection[fx.Node] = ()) -> int:
    """Common subexpressions: of equal operations on equal operands the first stays; returns how many went.

    What ``spare`` names stays, and takes nobody's place.
    """
    seen: dict[Any, fx.Node] = {}
    gone = 0
    for node in function.nodes:
        if node.op not in ("call_function", "get_attr") or node in spare:
            continue
        key = (
            node.target,
            node.args,
            tuple(sorted(node.kwargs.items(), key=lambda item: item[0])),
            _types(node),
        )
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


def _part_of_concat(m: Match) -> tuple[fx.Node, int | Dim, int | Dim] | None:
    """The operand of a concat that a slice lies in, and where in it."""
    axis, begin = _axis(m.root), m.root.kwargs.get("start", 0)
    if m.root.kwargs.get("step", 1) != 1 or _axis(m["whole"]) != axis:
        return None
    length = m.root.meta["value"].shape[axis]
    position: int | Dim = 0
    for part in m["whole"].args[0]:
        size = part.meta["value"].shape[axis]
        start = begin - position
        left = size - start - length
        if isinstance(start, int) and isinstance(left, int) and start >= 0 and left >= 0:
            return part, start, start + length
        position = position + size
    return None


def _slice_part(build: Builder, m: Match) -> fx.Node:
    part, start, end = _part_of_concat(m)
    return build.slice(part, dim=_axis(m.root), start=start, end=end)


def _broadcasts_alone(m: Match) -> str | None:
    return None if _without_expansion(m) else "an operand needs its expansion"


def _without_expansion(m: Match) -> list[Any] | None:
    """The operands without expands, and without reshapes that only prepend axes of size 1; None if no different."""
    operands = list(m.root.args)
    for i, operand in enumerate(operands):
        for plain in _narrower(operand):
            tried = (*operands[:i], plain, *operands[i + 1 :])
            shapes = [o.meta["value"].shape for o in tried if isinstance(o, fx.Node)]
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


def _narrow_factors(m: Match) -> list[fx.Node] | None:
    """The operands of a product of matrices without expansions of the axes before those; None if no different."""
    operands: list[fx.Node] = list(m.root.args)
    for i, operand in enumerate(operands):
        if not is_call(operand, "expand"):
            continue
        plain = operand.args[0]
        tried = [*operands[:i], plain, *operands[i + 1 :]]
        shapes = [o.meta["value"].shape for o in tried]
        lead = broadcast(*(s[:-2] for s in shapes))
        same = plain.meta["value"].shape[-2:] == operand.meta["value"].shape[-2:]
        if same and len(shapes[i]) >= 2 and lead == m.root.meta["value"].shape[:-2]:
            operands = tried
    return operands if operands != list(m.root.args) else None


def _narrow_parts(m: Match) -> list[fx.Node] | None:
    """The operands of a concat without expansions of the same other axes; None if they do not have those."""
    axis, narrow = _axis(m.root), []
    for part in m.root.args[0]:
        if not is_call(part, "expand") or part.args[0].meta["value"].rank != part.meta["value"].rank:
            return None
        narrow.append(part.args[0])
    shapes = [n.meta["value"].shape for n in narrow]
    kept = {(*s[:axis], *s[axis + 1 :]) for s in shapes}
    whole = all(s[axis] == p.meta["value"].shape[axis] for s, p in zip(shapes, m.root.args[0], strict=True))
    return narrow if whole and len(kept) == 1 else None


def _expand_concat(build: Builder, m: Match) -> fx.Node:
    joined = build.concat(tuple(_narrow_parts(m)), dim=_axis(m.root))
    return build.expand(joined, shape=m.root.meta["value"].shape)


def _filled(m: Match) -> tuple[fx.Node, ...]:
    axis = _axis(m.root)
    return tuple(t for t in m.root.args[0] if t.meta["value"].shape[axis] != 0)


def _has_empty(m: Match) -> str | None:
    return None if 0 < len(_filled(m)) < max(len(m.root.args[0]), 2) else "no operand is empty"


def _drop_empty(build: Builder, m: Match) -> fx.Node:
    filled = _filled(m)
    return filled[0] if len(filled) == 1 else build.concat(filled, dim=m.root.kwargs["dim"])


def _written_out(operand: Any, m: Match) -> Any:
    """The number that an operand is everywhere; the operand itself where it is none."""
    value = operand
    while is_call(value, "expand", "reshape"):
        value = value.args[0]
    if is_call(value, "full"):
        number = value.kwargs["value"]
    elif isinstance(value, fx.Node) and value.op == "get_attr" and value.meta["value"].rank == 0:
        number = m.function.parameter(value).item()
    else:
        return operand
    return number if is_number(number) and number == number else operand


def _with_numbers(m: Match) -> list[Any] | None:
    """The operands with numbers for what is one number everywhere; None if that changes nothing or too much."""
    operands = list(m.root.args)
    for i, operand in enumerate(operands):
        tried = [*operands[:i], _written_out(operand, m), *operands[i + 1 :]]
        known = [o.meta["value"] if isinstance(o, fx.Node) else o for o in tried]
        if any(isinstance(o, Value) for o in known) and m.root.target.infer(*known) == m.root.meta["value"]:
            operands = tried
    return operands if operands != list(m.root.args) else None


def _result(m: Match) -> int | float | None:
    """What an operation on numbers alone gives; None where a value is not known, or the result no number."""
    operands = []
    for operand in m.root.args:
        number = _written_out(operand, m)
        if not is_number(number):
            return None
        if isinstance(operand, fx.Node):
            value: Value = operand.meta["value"]
            if not all(d == 1 for d in value.shape):
                return None
            number = torch.full(value.shape, number, dtype=value.torch_dtype)
        operands.append(number)
    result = m.root.target(*operands, **m.root.kwargs).item()
    return result if is_number(result) and math.isfinite(result) else None


def _as_number(build: Builder, m: Match) -> fx.Node:
    value: Value = m.root.meta["value"]
    return build.full(shape=value.shape, value=_result(m), dtype=value.dtype)


def _promoted(m: Match) -> tuple[int, list[fx.Node], fx.Node] | None:
    """An operand that is integers made floats, which the operation would do itself: its position, its moves, them."""
    for i, operand in enumerate(m.root.args):
        moves, node = [], operand
        while is_call(node, "reshape", "permute", "expand"):
            moves, node = [*moves, node], node.args[0]
        if not is_call(node, "cast") or node.args[0].meta["value"].is_float:
            continue
        tried = [a.meta["value"] if isinstance(a, fx.Node) else a for a in m.root.args]
        tried[i] = Value(node.args[0].meta["value"].dtype, operand.meta["value"].shape)
        if tried[i].dtype != "bool" and m.root.target.infer(*tried) == m.root.meta["value"]:
            return i, moves, node.args[0]
    return None


def _promote(build: Builder, m: Match) -> fx.Node:
    i, moves, x = _promoted(m)
    for move in reversed(moves):
        x = build.emit(move.target, x, **move.kwargs)
    return build.emit(m.root.target, *m.root.args[:i], x, *m.root.args[i + 1 :])


_NEGATIONS = {"eq": "ne", "ne": "eq", "lt": "ge", "ge": "lt", "gt": "le", "le": "gt"}


def _negated(name: str) -> Callable[[Builder, Match], fx.Node]:
    return lambda build, m: build.emit(_NEGATIONS[name], m["x"], m["y"])


def _negates(m: Match) -> str | None:
    """not (x < y) is not x >= y where one of them may be NaN; == and != are each other's negation always."""
    if m.root.args[0].target.name in ("eq", "ne"):
        return None

    def is_float(x: Any) -> bool:
        return x.meta["value"].is_float if isinstance(x, fx.Node) else isinstance(x, float)

    return "a comparison with NaN is false either way" if is_float(m["x"]) or is_float(m["y"]) else None


# Every value of the first type is a value of the others.
_EXACT = {
    "bool": ("uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64"),
    "int32": ("int64", "float64"),
    "bfloat16": ("float32", "float64"),
    "float16": ("float32", "float64"),
    "float32": ("float64",),
}


def _inner_is_exact(m: Match) -> str | None:
    before, between = m.value("x").dtype, m["inner"].meta["value"].dtype
    return None if between in _EXACT.get(before, ()) else f"{between} does not hold every {before}"


def _cast_once(build: Builder, m: Match) -> fx.Node:
    return build.cast(m["x"], dtype=m.root.kwargs["dtype"])


def _broadcast_mask(build: Builder, m: Match) -> fx.Node:
    defaults = m.root.target.attributes
    attributes = {name: a for name, a in m.root.kwargs.items() if a != defaults[name]}
    return build.attention(m["q"], m["k"], m["v"], m["mask"], **attributes)


_X = P.any("x")

RULES = (
    # cast(x, float32) of a float32 x  ->  x;  the same for reshape, expand, slice, and padding by nothing
    Rule("cleanup.no_op", P.op(("cast", "reshape", "expand", "slice"), _X), _first, _unchanged),
    Rule(
        "cleanup.no_padding",
        P.pad(_X),
        _first,
        lambda m: "it pads" if any(m.root.kwargs["pads"]) else None,
    ),
    # x + 0, x * 1, x - 0, x / 1, x ** 1  ->  x
    Rule(
        "cleanup.add_zero",
        P.one_of(P.add(_X, 0), P.sub(_X, 0), P.add(_X, 0.0), P.sub(_X, 0.0)),
        _first,
        _unchanged,
    ),
    Rule("cleanup.times_one", P.one_of(P.mul(_X, 1), P.div(_X, 1), P.pow(_X, 1)), _first, _unchanged),
    # not not x  ->  x
    Rule("cleanup.not_not", P.logical_not(P.logical_not(_X)), _first, _unchanged),
    # not (x == y)  ->  x != y
    *(
        Rule(
            f"cleanup.not_{name}",
            P.logical_not(P.op((name,), P.optional("x"), P.optional("y"))),
            _negated(name),
            _negates,
        )
        for name in _NEGATIONS
    ),
    # cast(cast(x, int64), float32) of an int32 or boolean x  ->  cast(x, float32)
    Rule("cleanup.cast_of_cast", P.cast(P.cast(_X).named("inner")), _cast_once, _inner_is_exact),
    # x * cast(i, float32) of a float32 x and an int64 i  ->  x * i
    Rule(
        "cleanup.promotion",
        P.op(("add", "sub", "mul", "div"), ...),
        _promote,
        lambda m: None if _promoted(m) else "no operand is a cast that promotion makes",
    ),
    # slice(slice(x))  ->  slice(x)
    Rule("cleanup.slice_of_slice", P.slice(P.slice(_X).named("inner")), _compose_slices, _slices_compose),
    # slice(concat(x, y))  ->  slice(x), where it lies in x alone
    Rule(
        "cleanup.slice_of_concat",
        P.slice(P.concat(...).named("whole")),
        _slice_part,
        lambda m: None if _part_of_concat(m) else "it does not lie in one operand",
    ),
    # expand(expand(x))  ->  expand(x)
    Rule(
        "cleanup.expand_of_expand",
        P.expand(P.expand(_X)),
        lambda b, m: b.expand(m["x"], shape=m.root.kwargs["shape"]),
    ),
    # concat(expand(x), expand(y))  ->  expand(concat(x, y))
    Rule(
        "cleanup.concat_of_expand",
        P.concat(...),
        _expand_concat,
        lambda m: None if _narrow_parts(m) else "the operands are not expanded alike",
    ),
    # concat(x, empty)  ->  x
    Rule("cleanup.concat_of_one", P.concat(...), _drop_empty, _has_empty),
    # x * full(2)  ->  x * 2;  where(c, full(0), x)  ->  where(c, 0, x);  x / a stored number  ->  x / 8
    Rule(
        "cleanup.number",
        P.op(ELEMENTWISE_NUMBER, ...),
        lambda b, m: b.emit(m.root.target, *_with_numbers(m)),
        lambda m: None if _with_numbers(m) else "no operand is a number",
    ),
    # sqrt(full(16))  ->  full(4)
    Rule(
        "cleanup.arithmetic",
        P.op(
            ("add", "sub", "mul", "div", "pow", "neg", "sqrt", "rsqrt", "reciprocal", "exp", "log", "cast"),
            ...,
        ),
        _as_number,
        lambda m: "it is not computed from numbers alone" if _result(m) is None else None,
    ),
    # attention(q, k, v, expand(mask))  ->  attention(q, k, v, mask), which broadcasts it by itself
    Rule(
        "cleanup.expanded_mask",
        P.attention(P.any("q"), P.any("k"), P.any("v"), P.expand(P.any("mask"))),
        _broadcast_mask,
        lambda m: None if m.value("mask").rank == 4 else "the mask gains axes",
    ),
    # x + expand(y)  ->  x + y where the sum has the same shape
    Rule("cleanup.broadcast", P.op(ELEMENTWISE_BINARY, ...), _drop_expansion, _broadcasts_alone),
)

# Only behind the rules for attention, which tell heads from their number.
PRODUCT_RULES = (
    # matmul(x, expand(y))  ->  matmul(x, y) where the leading axes broadcast
    Rule(
        "cleanup.broadcast_product",
        P.matmul(P.any(), P.any()),
        lambda build, m: build.matmul(*_narrow_factors(m)),
        lambda m: None if _narrow_factors(m) else "no factor is expanded, or the product needs it",
    ),
)
