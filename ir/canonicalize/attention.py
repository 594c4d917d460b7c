"""Attention that a model spells out, and what belongs into the `attention` operation: scales, shared key heads."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import fx

from tersor.ir.canonicalize.layout import Layout, arrange, trace
from tersor.ir.canonicalize.masks import LEAST_FACTOR, constant, hides
from tersor.ir.dims import Dim
from tersor.ir.matching import Match, P, Rule, is_call, is_number
from tersor.ir.opset.rules import broadcast
from tersor.ir.program import Builder

_MOST_MASKS = 4
_FLOAT32_ROUNDING = 2.0**-23


@dataclass
class _Scores:
    """What is between a softmax and the product of queries and keys."""

    q: fx.Node
    k: fx.Node  # [..., D, Tk]
    scale: float
    softcap: float | None
    added: list[tuple[fx.Node, float]]  # additive masks, and what they are multiplied by
    hidden: list[tuple[fx.Node, bool]]  # boolean values, and which of their values hides a key
    lowest: float  # the number with which it does


def _peel(scores: Any) -> _Scores | str:
    """Takes scale, soft cap and masks off the scores; a reason when they are something else."""
    scale, softcap, added, hidden, lowest = 1.0, None, [], [], float("-inf")
    node = scores
    for _ in range(_MOST_MASKS + 4):
        if is_call(node, "matmul"):
            return _Scores(
                node.args[0], node.args[1], scale * (softcap or 1.0), softcap, added, hidden, lowest
            )
        if is_call(node, "mul", "div") and any(is_number(a) for a in node.args):
            x, number = (
                (node.args[0], node.args[1]) if is_number(node.args[1]) else (node.args[1], node.args[0])
            )
            if node.target.name == "div" and not is_number(node.args[1]):
                return "a number is divided by the scores"
            scale *= number if node.target.name == "mul" else 1 / number
            node = x
        elif is_call(node, "tanh"):
            if softcap is not None or scale <= 0:
                return "a tanh of the scores is no soft cap"
            node, softcap, scale = node.args[0], scale, 1.0
        elif is_call(node, "add", "where") and softcap is not None:
            return "the mask is applied before the soft cap"
        elif is_call(node, "add"):
            side = [_leads_to_product(a) for a in node.args]
            if side[0] == side[1]:
                return "the scores are a sum of two products, or of none"
            node, mask = node.args if side[0] else node.args[::-1]
            if not isinstance(mask, fx.Node):
                return "a number is added to the scores"
            added.append((mask, scale))
        elif is_call(node, "where"):
            condition, x, y = node.args
            if scale < LEAST_FACTOR:
                return "what hides keys is multiplied by a number that is too small"
            if hides(x) or hides(y):
                lowest = max(lowest, constant(x if hides(x) else y))
            if hides(x):
                hidden.append((condition, True))
                node = y
            elif hides(y):
                hidden.append((condition, False))
                node = x
            else:
                return "the scores are replaced by something that does not hide them"
        else:
            return (
                f"the scores come from {node.target.name if is_call(node) else 'an input'}, not from a matmul"
            )
    return "too many operations between matmul and softmax"


def _leads_to_product(node: Any) -> bool:
    """Whether scores are behind this operand (masks never contain a matmul)."""
    for _ in range(2 * _MOST_MASKS):
        if is_call(node, "matmul"):
            return True
        if is_call(node, "where"):
            node = node.args[2] if hides(node.args[1]) else node.args[1]
        elif is_call(node, "tanh"):
            node = node.args[0]
        elif is_call(node, "mul", "div", "add"):
            nodes = [a for a in node.args if isinstance(a, fx.Node)]
            node = next((a for a in nodes if _leads_to_product(a)), None)
        else:
            return False
    return False


def _is_attention(m: Match) -> str | None:
    softmax, v = m["softmax"], m.value("v")
    if softmax.kwargs["dim"] % v.rank != v.rank - 1:
        return "the softmax is not over the keys"
    scores = _peel(m["scores"])
    if isinstance(scores, str):
        return scores
    q, k = scores.q.meta["value"], scores.k.meta["value"]
    if not q.rank == k.rank == v.rank or q.rank not in (3, 4):
        return f"queries, keys and values have ranks {q.rank}, {k.rank}, {v.rank}"
    # the products broadcast one head of keys over those of the queries
    shared = (q.shape[0], 1) if q.rank == 4 else q.shape[:-2]
    if k.shape[:-2] not in (q.shape[:-2], shared) or k.shape[:-2] != v.shape[:-2]:
        return "queries, keys and values have different batches or heads"
    if q.rank == 4 and isinstance(q.shape[1], Dim):
        return "the number of heads is not static"
    full = (*q.shape[:-1], k.shape[-1])
    masks = [x for x, _ in (*scores.added, *scores.hidden)]
    if any(broadcast(x.meta["value"].shape, full) != full for x in masks):
        return "a mask changes the shape of the scores"
    return None


def _fuse(build: Builder, m: Match) -> fx.Node:
    scores = _peel(m["scores"])
    rank = m.value("v").rank
    heads, kv_heads = (x.meta["value"].shape[1] if rank == 4 else 1 for x in (scores.q, scores.k))
    keys = build.permute(scores.k, dims=(*range(rank - 2), rank - 1, rank - 2))
    q, k, v = (_merged(build, x) for x in (scores.q, keys, m["v"]))
    mask = _mask(build, scores, rank)
    cap = {} if scores.softcap is None else {"softcap": scores.softcap}
    out = build.attention(q, k, v, mask, heads=heads, kv_heads=kv_heads, scale=scores.scale, **cap)
    if rank == 3:
        return out
    batch, length, width = out.meta["value"].shape
    return build.permute(build.reshape(out, shape=(batch, length, heads, width // heads)), dims=(0, 2, 1, 3))


def _merged(build: Builder, x: fx.Node) -> fx.Node:
    if x.meta["value"].rank == 3:
        return x
    batch, heads, length, width = x.meta["value"].shape
    return build.reshape(build.permute(x, dims=(0, 2, 1, 3)), shape=(batch, length, heads * width))


def _mask(build: Builder, scores: _Scores, rank: int) -> fx.Node | None:
    """One mask of rank 4: boolean when all are boolean, else additive."""

    def four(x: fx.Node) -> fx.Node:
        shape = x.meta["value"].shape
        if rank == 3 and len(shape) == 3:  # [N, Tq, Tk] -> [N, 1, Tq, Tk]
            return build.reshape(x, shape=(shape[0], 1, *shape[1:]))
        return build.reshape(x, shape=(*((1,) * (4 - len(shape))), *shape))

    seen = [build.logical_not(four(c)) if when else four(c) for c, when in scores.hidden]
    boolean = None
    for s in seen:
        boolean = s if boolean is None else build.logical_and(boolean, s)
    additive = None
    for mask, factor in scores.added:
        a = four(mask) if factor == 1.0 else build.mul(four(mask), factor)
        additive = a if additive is None else build.add(additive, a)
    if additive is None or boolean is None:
        return additive if boolean is None else boolean
    return build.add(additive, build.where(boolean, 0.0, scores.lowest))


# -- operands


def _with(m: Match, build: Builder, operands: list[Any] | tuple[Any, ...], **changed: Any) -> fx.Node:
    return build.emit(m.root.target, *operands, **{**m.root.kwargs, **changed})


def _scaled_operand(m: Match) -> tuple[int, fx.Node, Layout, float] | None:
    """The query or key operand that is a number times a value: its position, the value, its layout, the number."""
    for i in (0, 1):
        node, layout = trace(m.root.args[i])
        if is_call(node, "mul", "div") and is_number(node.args[1]) and isinstance(node.args[0], fx.Node):
            return i, node.args[0], layout, node.args[1] if node.target.name == "mul" else 1 / node.args[1]
        if is_call(node, "mul") and is_number(node.args[0]):
            return i, node.args[1], layout, node.args[0]
    return None


def _fold_scale(build: Builder, m: Match) -> fx.Node:
    i, x, layout, factor = _scaled_operand(m)
    operands = [arrange(build, x, layout) if j == i else a for j, a in enumerate(m.root.args)]
    return _with(m, build, operands, scale=m.root.kwargs["scale"] * factor)


def _usual_scale(m: Match) -> float:
    """1 / sqrt(D), as torch computes it."""
    return 1 / math.sqrt(m.root.args[0].meta["value"].shape[2] // m.root.kwargs["heads"])


def _is_usual_scale(m: Match) -> str | None:
    scale, usual = m.root.kwargs["scale"], _usual_scale(m)
    if scale == usual:
        return "it is exact"
    return None if abs(scale - usual) <= _FLOAT32_ROUNDING * usual else "it is another number"


def _repeated(node: Any) -> tuple[fx.Node, Layout, int, int, int] | None:
    """(source, layout without the repetition, repeated atom, heads before it, repeats) of keys repeated per group."""
    if not is_call(node, "reshape", "permute", "expand"):
        return None
    wide, layout = trace(node)
    if not is_call(wide, "expand"):
        return None
    narrow = wide.args[0]
    before, after = narrow.meta["value"].shape, wide.meta["value"].shape
    before = (1,) * (len(after) - len(before)) + before
    axes = [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
    if len(axes) != 1 or before[axes[0]] != 1 or isinstance(after[axes[0]], Dim):
        return None
    atoms = layout.source[axes[0]]
    feature = layout.result[-1]
    if len(atoms) != 1 or atoms[0] not in feature:
        return None
    heads = 1
    for atom in feature[: feature.index(atoms[0])]:
        heads = heads * layout.sizes[atom]
    if isinstance(heads, Dim):
        return None
    return narrow, layout.resized(atoms[0], 1), atoms[0], heads, after[axes[0]]


def _unturned(node: Any) -> Any:
    """What a rotary embedding turns; the same in every head of a group, so it may come before the repetition."""
    return node.args[0] if is_call(node, "rotary_embedding") else node


def _shares_keys(m: Match) -> str | None:
    k, v = _repeated(_unturned(m.root.args[1])), _repeated(m.root.args[2])
    if k is None or v is None:
        return "keys and values are not both repeated"
    if is_call(m.root.args[2], "rotary_embedding"):
        return "the values are rotated"
    if k[3:] != v[3:] or k[3] * k[4] != m.root.kwargs["kv_heads"]:
        return "the repetition does not give the number of heads"
    return None


def _share_keys(build: Builder, m: Match) -> fx.Node:
    operands = list(m.root.args)
    for i in (1, 2):
        source, layout, _, heads, _ = _repeated(_unturned(operands[i]))
        wanted = len(layout.source)
        if source.meta["value"].rank != wanted:
            source = build.reshape(source, shape=layout.shape(layout.source))
        shared = arrange(build, source, layout)
        if is_call(operands[i], "rotary_embedding"):
            turn = operands[i]
            shared = build.rotary_embedding(shared, *turn.args[1:], **{**turn.kwargs, "heads": heads})
        operands[i] = shared
    return _with(m, build, operands, kv_heads=heads)


_SOFTMAX = P.softmax(P.any("scores")).named("softmax")
# Exporters spell out that a row which hides every key gives 0, as it does in the operation.
_SAFE_SOFTMAX = P.where(P.ne(_SOFTMAX, _SOFTMAX), 0.0, _SOFTMAX)

RULES = (
    # matmul(softmax(matmul(q, k^T) * scale + mask), v)  ->  attention(q, k, v, mask) on merged heads
    Rule(
        "attention.fuse",
        P.matmul(P.one_of(_SOFTMAX, _SAFE_SOFTMAX), P.any("v")),
        _fuse,
        _is_attention,
    ),
    # attention(q * c, k, v, scale=s)  ->  attention(q, k, v, scale=s*c)
    Rule(
        "attention.scale",
        P.attention(...),
        _fold_scale,
        lambda m: None if _scaled_operand(m) else "neither queries nor keys are scaled",
    ),
    # attention(q, k, v, scale=0.17677669)  ->  attention(q, k, v, scale=1 / sqrt(32)): it went through float32
    Rule(
        "attention.usual_scale",
        P.attention(...),
        lambda build, m: _with(m, build, m.root.args, scale=_usual_scale(m)),
        _is_usual_scale,
    ),
    # attention(q, repeat(k), repeat(v), kv_heads=H)  ->  attention(q, k, v, kv_heads=H/n)
    # attention(q, rotary(repeat(k)), repeat(v), kv_heads=H)  ->  attention(q, rotary(k), v, kv_heads=H/n)
    Rule("attention.shared_keys", P.attention(...), _share_keys, _shares_keys),
)
