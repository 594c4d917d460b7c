"""Rotary position embeddings on merged heads."""

from __future__ import annotations

from torch import fx

from tersor.ir.dims import Dim
from tersor.ir.matching import Match, P, Pattern, Rule, is_call
from tersor.ir.program import Builder

_X, _COS, _SIN = P.any("x"), P.any("cos"), P.any("sin")


def _heads_axis(m: Match) -> int | str:
    """Where x [B, H, T, D] or [B, T, H, D] has its heads, over which cos and sin broadcast; or why it is neither."""
    x = m.value("x")
    if x.rank != 4:
        return f"{x} is not [batch, heads, length, size], nor [batch, length, heads, size]"
    cos = m.value("cos").shape
    if cos != m.value("sin").shape or len(cos) > 4:
        return "cos and sin have different shapes"
    cos = (1,) * (4 - len(cos)) + cos
    axis = next((a for a in (1, 2) if cos[a] == 1 and cos[3 - a] == x.shape[3 - a]), None)
    if axis is None or cos[0] not in (1, x.shape[0]) or cos[3] != x.shape[3]:
        return "cos and sin are not one row for each position"
    return "the number of heads is not static" if isinstance(x.shape[axis], Dim) else axis


def _rotation(m: Match) -> str | None:
    axis = _heads_axis(m)
    return axis if isinstance(axis, str) else None


def _is_rotation(m: Match) -> str | None:
    if reason := _rotation(m):
        return reason
    x, base, size, start = m["x"], m["base"], m.value("x").shape[-1], 0
    if base is not x:  # x is itself a slice, and a slice of a slice has become one slice
        if not is_call(x, "slice") or x.args[0] is not base or _cut(x) is None:
            return "the two parts are of another value"
        start = _cut(x)[0]
    middle, end = start + size // 2, start + size
    if _cut(m["low"]) != (start, middle) or _cut(m["high"]) != (middle, end):
        return "the two parts are not the halves of each head"
    return None


def _cut(node: fx.Node) -> tuple[object, object] | None:
    value, attributes = node.args[0].meta["value"], node.kwargs
    if attributes["dim"] % value.rank != value.rank - 1 or attributes.get("step", 1) != 1:
        return None
    end = attributes.get("end")
    return attributes.get("start", 0), value.shape[-1] if end is None else end


def _rotate(build: Builder, m: Match, interleaved: bool = False) -> fx.Node:
    axis = _heads_axis(m)
    cos, sin = (_per_position(build, m[name], axis) for name in ("cos", "sin"))
    return _turned(build, m["x"], cos, sin, axis, interleaved)


def _turned(build: Builder, x: fx.Node, cos: fx.Node, sin: fx.Node, axis: int, interleaved: bool) -> fx.Node:
    """The rotation on merged heads, as a value of x's shape, which has its heads at ``axis``."""
    time_first = x if axis == 2 else build.permute(x, dims=(0, 2, 1, 3))
    batch, length, heads, size = time_first.meta["value"].shape
    merged = build.reshape(time_first, shape=(batch, length, heads * size))
    pairs = {"interleaved": True} if interleaved else {}
    turned = build.rotary_embedding(merged, cos, sin, heads=heads, **pairs)
    turned = build.reshape(turned, shape=(batch, length, heads, size))
    return turned if axis == 2 else build.permute(turned, dims=(0, 2, 1, 3))


def _per_position(build: Builder, table: fx.Node, axis: int) -> fx.Node:
    """A table that broadcasts over heads as [B, T, D]."""
    shape = table.meta["value"].shape
    shape = (1,) * (4 - len(shape)) + shape
    return build.reshape(table, shape=(*shape[:axis], *shape[axis + 1 :]))


def _is_interleaved(m: Match) -> str | None:
    if reason := _rotation(m):
        return reason
    size = m.value("x").shape[3]
    for name, start in (("even", 0), ("odd", 1)):
        cut = m[name].kwargs
        if (cut["dim"] % 4, cut.get("start", 0), cut.get("step", 1)) != (3, start, 2) or cut.get("end") not in (
            None, size,
        ):  # fmt: skip
            return "the two parts are not the even and the odd channels"
    if m["stacked"].kwargs["dim"] % 5 != 4 or m["half"].meta["value"].shape != m.value("x").shape:
        return "the pairs are not put together again"
    return None


def _stacked(even: Pattern, odd: Pattern) -> Pattern:
    """(-odd, even) side by side, as a value of the shape that both were cut from."""
    negative = P.one_of(P.reshape(P.neg(odd)), P.neg(P.reshape(odd)))
    return P.reshape(P.concat(P.sequence(negative, P.reshape(even))).named("stacked")).named("half")


def _is_partial(m: Match) -> str | None:
    whole, heads_first = m.value("whole"), "split" in m
    if whole.rank != 4 or m.root.kwargs["dim"] % 4 != 3:
        return "the parts are not put together along each head"
    if heads_first and m["split"].kwargs["dims"] != (0, 2, 1, 3):
        return "the rotated part has its axes elsewhere"
    if not heads_first and m["turning"].kwargs["heads"] != whole.shape[2]:
        return "the rotated part has other heads"
    turned, rest = _cut(m["turned"]), _cut(m["rest"])
    if (
        turned is None
        or rest is None
        or turned[1] != rest[0]
        or turned[1] - turned[0] != m.value("cos").shape[-1]
    ):
        return "the parts do not make up a whole head"
    return None


def _rotate_whole(build: Builder, m: Match) -> fx.Node:
    head = build.slice(m["whole"], dim=3, start=_cut(m["turned"])[0], end=_cut(m["rest"])[1])
    interleaved = m["turning"].kwargs.get("interleaved", False)
    return _turned(build, head, m["cos"], m["sin"], 1 if "split" in m else 2, interleaved)


def _turning(x: Pattern) -> Pattern:
    return P.reshape(P.rotary_embedding(P.reshape(x), _COS, _SIN).named("turning"))


_LOW, _HIGH = P.slice(P.any("base")).named("low"), P.slice(P.any("base")).named("high")
_PART, _REST = P.slice(P.any("whole")).named("turned"), P.slice(P.any("whole")).named("rest")


def _one_for_all(table: fx.Node) -> fx.Node | None:
    """The table [1, T, R] that is the same for every text of a batch."""
    if is_call(table, "expand") and table.args[0].meta["value"].shape == (1, *table.meta["value"].shape[1:]):
        return table.args[0]
    return None


def _share_tables(build: Builder, m: Match) -> fx.Node:
    cos, sin = (_one_for_all(m[name]) for name in ("cos", "sin"))
    return build.rotary_embedding(m["x"], cos, sin, **m.root.kwargs)


RULES = (
    # x * cos + concat(-x[R/2:], x[:R/2]) * sin  ->  rotary_embedding(x, cos, sin)
    Rule(
        "rotary.halves",
        P.add(P.mul(_X, _COS), P.mul(P.concat(P.sequence(P.neg(_HIGH), _LOW)), _SIN)),
        _rotate,
        _is_rotation,
    ),
    # x * cos + stack(-x[1::2], x[::2]) * sin  ->  rotary_embedding(x, cos, sin, interleaved)
    Rule(
        "rotary.interleaved",
        P.add(
            P.mul(_X, _COS),
            P.mul(_stacked(P.slice(_X, ...).named("even"), P.slice(_X, ...).named("odd")), _SIN),
        ),
        lambda b, m: _rotate(b, m, interleaved=True),
        _is_interleaved,
    ),
    # rotary(x, expand(cos), expand(sin))  ->  rotary(x, cos, sin), where they are the same for the whole batch
    Rule(
        "rotary.shared_tables",
        P.rotary_embedding(_X, _COS, _SIN),
        _share_tables,
        lambda m: (
            None if _one_for_all(m["cos"]) and _one_for_all(m["sin"]) else "each text has its own angles"
        ),
    ),
    # concat(rotary(x[..., :R]), x[..., R:])  ->  rotary(x), which leaves the rest of each head as it is
    Rule(
        "rotary.partial",
        P.concat(
            P.sequence(
                P.one_of(
                    P.permute(_turning(P.permute(_PART, dims=(0, 2, 1, 3)))).named("split"), _turning(_PART)
                ),
                _REST,
            )
        ),
        _rotate_whole,
        _is_partial,
    ),
)
