"""Rotary position embeddings on merged heads."""

from __future__ import annotations

from torch import fx

from tersor.ir.dims import Dim
from tersor.ir.matching import Match, P, Rule
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
    size = m.value("x").shape[-1]
    low, high = m["low"], m["high"]
    if _cut(low) != (0, size // 2) or _cut(high) != (size // 2, size):
        return "the two parts are not the halves of each head"
    return None


def _cut(node: fx.Node) -> tuple[object, object] | None:
    value, attributes = node.args[0].meta["value"], node.kwargs
    if attributes["dim"] % value.rank != value.rank - 1 or attributes.get("step", 1) != 1:
        return None
    end = attributes.get("end")
    return attributes.get("start", 0), value.shape[-1] if end is None else end


def _rotate(build: Builder, m: Match) -> fx.Node:
    batch, heads, length, size = m.value("x").shape
    merged = build.reshape(build.permute(m["x"], dims=(0, 2, 1, 3)), shape=(batch, length, heads * size))
    tables = [_per_position(build, m[name]) for name in ("cos", "sin")]
    turned = build.rotary_embedding(merged, *tables, heads=heads)
    return build.permute(build.reshape(turned, shape=(batch, length, heads, size)), dims=(0, 2, 1, 3))


def _per_position(build: Builder, table: fx.Node) -> fx.Node:
    """[B, 1, T, D] -> [B, T, D]."""
    shape = table.meta["value"].shape
    shape = (1,) * (4 - len(shape)) + shape
    return build.reshape(table, shape=(shape[0], *shape[2:]))


_LOW, _HIGH = P.slice(_X).named("low"), P.slice(_X).named("high")

RULES = (
    # x * cos + concat(-x[R/2:], x[:R/2]) * sin  ->  rotary_embedding(x, cos, sin)
    Rule(
        "rotary.halves",
        P.add(P.mul(_X, _COS), P.mul(P.concat(P.sequence(P.neg(_HIGH), _LOW)), _SIN)),
        _rotate,
        _is_rotation,
    ),
)
