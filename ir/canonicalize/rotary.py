"""Rotary position embeddings on merged heads."""

from __future__ import annotations

from torch import fx

from tersor.ir.dims import Dim
from tersor.ir.matching import Match, P, Rule, is_call
from tersor.ir.program import Builder

_X, _COS, _SIN = P.any("x"), P.any("cos"), P.any("sin")


def _rotation(m: Match) -> str | None:
    """x is [B, H, T, D], the halves are (-x[..., R/2:R], x[..., :R/2]), cos and sin broadcast over heads."""
    x = m.value("x")
    if x.rank != 4 or isinstance(x.shape[1], Dim):
        return f"{x} is not [batch, heads, length, size] with a static number of heads"
    batch, _, length, size = x.shape
    cos = m.value("cos").shape
    if cos != m.value("sin").shape or len(cos) > 4:
        return "cos and sin have different shapes"
    cos = (1,) * (4 - len(cos)) + cos
    if cos[0] not in (1, batch) or cos[1:3] != (1, length) or cos[3] != size:
        return "cos and sin are not one row for each position"
    return None


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


def _rotate(build: Builder, m: Match) -> fx.Node:
    return _turned(build, m["x"], *(_per_position(build, m[name]) for name in ("cos", "sin")))


def _turned(build: Builder, x: fx.Node, cos: fx.Node, sin: fx.Node) -> fx.Node:
    """The rotation on merged heads, as a value of x's shape [B, H, T, D]."""
    batch, heads, length, size = x.meta["value"].shape
    merged = build.reshape(build.permute(x, dims=(0, 2, 1, 3)), shape=(batch, length, heads * size))
    turned = build.rotary_embedding(merged, cos, sin, heads=heads)
    return build.permute(build.reshape(turned, shape=(batch, length, heads, size)), dims=(0, 2, 1, 3))


def _per_position(build: Builder, table: fx.Node) -> fx.Node:
    """[B, 1, T, D] -> [B, T, D]."""
    shape = table.meta["value"].shape
    shape = (1,) * (4 - len(shape)) + shape
    return build.reshape(table, shape=(shape[0], *shape[2:]))


_LOW, _HIGH = P.slice(P.any("base")).named("low"), P.slice(P.any("base")).named("high")


def _is_partial(m: Match) -> str | None:
    whole = m.value("whole")
    if whole.rank != 4 or m.root.kwargs["dim"] % 4 != 3 or m["split"].kwargs["dims"] != (0, 2, 1, 3):
        return "the parts are not put together along each head"
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
    return _turned(build, head, m["cos"], m["sin"])


RULES = (
    # x * cos + concat(-x[R/2:], x[:R/2]) * sin  ->  rotary_embedding(x, cos, sin)
    Rule(
        "rotary.halves",
        P.add(P.mul(_X, _COS), P.mul(P.concat(P.sequence(P.neg(_HIGH), _LOW)), _SIN)),
        _rotate,
        _is_rotation,
    ),
    # concat(rotary(x[..., :R]), x[..., R:])  ->  rotary(x), which leaves the rest of each head as it is
    Rule(
        "rotary.partial",
        P.concat(
            P.sequence(
                P.permute(
                    P.reshape(
                        P.rotary_embedding(
                            P.reshape(P.permute(P.slice(P.any("whole")).named("turned"), dims=(0, 2, 1, 3))),
                            _COS,
                            _SIN,
                        )
                    )
                ).named("split"),
                P.slice(P.any("whole")).named("rest"),
            )
        ),
        _rotate_whole,
        _is_partial,
    ),
)
