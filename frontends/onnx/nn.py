"""ONNX operators that Transformers are made of: products, convolutions, norms, attention."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import fx

from tersor.frontends.aten import batch_norm, merge_heads, split_heads
from tersor.frontends.onnx.layout import non_negative, spread
from tersor.frontends.onnx.reader import STANDARD
from tersor.frontends.onnx.table import MICROSOFT, Call, converts, size, value
from tersor.frontends.onnx.values import Known
from tersor.ir import Dim
from tersor.ir.dims import product

# -- products


@converts("MatMul")
def _matmul(c: Call) -> fx.Node:
    x, y = c.node(0), c.node(1)
    left = x if len(size(x)) > 1 else c.reshape(x, (1, *size(x)))
    right = y if len(size(y)) > 1 else c.reshape(y, (*size(y), 1))
    result = c.build.matmul(left, right)
    lead, rows, columns = size(result)[:-2], size(left)[-2:-1], size(right)[-1:]
    shape = (*lead, *(rows if len(size(x)) > 1 else ()), *(columns if len(size(y)) > 1 else ()))
    return c.reshape(result, shape)


@converts("Gemm")
def _gemm(c: Call) -> fx.Node:
    """alpha * A' B' + beta * C."""
    x, weight = c.node(0), c.node(1)
    x = c.build.permute(x, dims=(1, 0)) if c.attribute("transA", 0) else x
    alpha, beta = c.attribute("alpha", 1.0), c.attribute("beta", 1.0)
    if c.attribute("transB", 0) and isinstance(c.inputs[1], Known):
        if alpha == beta == 1 and c.given(2) and size(c.require(2)) == size(weight)[:1]:
            return c.build.linear(x, weight, c.node(2))
        result = c.build.linear(x, weight)
    else:
        weight = c.build.permute(weight, dims=(1, 0)) if c.attribute("transB", 0) else weight
        result = c.build.matmul(x, weight)
    result = scaled(c, result, alpha)
    return c.build.add(result, scaled(c, c.node(2), beta)) if c.given(2) and beta != 0 else result


def scaled(c: Call, x: fx.Node, factor: float) -> fx.Node:
    return x if factor == 1 else c.build.mul(x, factor)


@converts("Einsum", since=12)
def _einsum(c: Call) -> fx.Node:
    """One operand, or the product of two: batch axes, then rows, summed axes and columns, each taken together."""
    inputs, _, output = c.attribute("equation").replace(" ", "").partition("->")
    terms = inputs.split(",")
    if not output and "->" not in c.attribute("equation"):
        output = "".join(sorted(x for x in set(inputs) - {","} if inputs.count(x) == 1))
    if (
        len(terms) != len(c.inputs)
        or len(terms) > 2
        or "." in inputs
        or any(len(set(t)) < len(t) for t in terms)
    ):
        raise c.refuse(f"computes {c.attribute('equation')!r}", why="only plain products of two are known")
    operands = [_summed(c, c.node(i), t, [x for j, x in enumerate([*terms, output]) if j != i])
                for i, t in enumerate(terms)]  # fmt: skip
    if len(operands) == 1:
        x, labels = operands[0]
        return _ordered(c, x, labels, output)
    (x, left), (y, right) = operands
    sizes = {**dict(zip(left, size(x), strict=True)), **dict(zip(right, size(y), strict=True))}
    batch = [n for n in output if n in left and n in right]
    rows = [n for n in output if n in left and n not in right]
    columns = [n for n in output if n in right and n not in left]
    inner = [n for n in left if n in right and n not in output]

    def together(names: list[str]) -> int | Dim:
        return product(sizes[n] for n in names)

    lead = [sizes[n] for n in batch]
    x = c.reshape(_ordered(c, x, left, [*batch, *rows, *inner]), (*lead, together(rows), together(inner)))
    y = c.reshape(
        _ordered(c, y, right, [*batch, *inner, *columns]), (*lead, together(inner), together(columns))
    )
    made = [*batch, *rows, *columns]
    return _ordered(c, c.reshape(c.build.matmul(x, y), [sizes[n] for n in made]), made, output)


def _summed(c: Call, x: fx.Node, labels: str, others: list[str]) -> tuple[fx.Node, list[str]]:
    """Without the axes that nothing else mentions."""
    lone = [i for i, n in enumerate(labels) if not any(n in other for other in others)]
    if lone:
        x = c.build.sum(x, dims=tuple(lone))
    return x, [n for i, n in enumerate(labels) if i not in lone]


def _ordered(c: Call, x: fx.Node, labels: Any, wanted: Any) -> fx.Node:
    dims = tuple(list(labels).index(n) for n in wanted)
    return x if list(dims) == list(range(len(dims))) else c.build.permute(x, dims=dims)


# -- norms


@converts("LayerNormalization")
@converts("LayerNormalization", domain=MICROSOFT)
def _layer_norm(c: Call) -> Any:
    x = c.node(0)
    shape, axis = size(x), c.axis(c.attribute("axis", -1), len(size(x)))
    flat = c.reshape(x, (*shape[:axis], product(shape[axis:])))
    weight, bias = None if _is_unnamed_ones(c.known(1)) else _flat(c, 1), _flat(c, 2)
    result = c.build.layer_norm(flat, weight, bias, eps=epsilon(c, 1e-5))
    _no_statistics(c)
    return c.reshape(result, shape)


def _is_unnamed_ones(weight: Known | None) -> bool:
    """A constant, not a stored tensor, that stands for no weight: the operator has to have one."""
    return (
        weight is not None and not weight.name and weight.sizes is None and bool((weight.tensor == 1).all())
    )


@converts("RMSNormalization", since=23)
@converts("SimplifiedLayerNormalization")
@converts("SimplifiedLayerNormalization", domain=MICROSOFT)
def _rms_norm(c: Call) -> Any:
    x = c.node(0)
    shape, axis = size(x), c.axis(c.attribute("axis", -1), len(size(x)))
    flat = c.reshape(x, (*shape[:axis], product(shape[axis:])))
    _no_statistics(c)
    return c.reshape(c.build.rms_norm(flat, _flat(c, 1), eps=epsilon(c, 1e-5)), shape)


def _flat(c: Call, i: int) -> fx.Node | None:
    return c.reshape(c.node(i), (product(size(c.node(i))),)) if c.given(i) else None


def _no_statistics(c: Call) -> None:
    if any(c.operator.outputs[1:]):
        raise c.refuse("returns its mean or deviation", why="they are for training")


def epsilon(c: Call, default: float) -> float:
    """The attribute as its author wrote it: the shortest decimal of the stored float32."""
    return float(str(np.float32(c.attribute("epsilon", default))))


@converts("BatchNormalization")
def _batch_norm(c: Call) -> fx.Node:
    if c.attribute("training_mode", 0):
        raise c.refuse("is in training mode", fix="export the model in evaluation mode")
    x = c.node(0)
    weight, bias, mean, variance = (c.node(i) for i in range(1, 5))
    return batch_norm(c.build, x, weight, bias, mean, variance, epsilon(c, 1e-5))


def _channel(c: Call, x: fx.Node, vector: fx.Node) -> fx.Node:
    return c.reshape(vector, (1, size(x)[1], *(1,) * (len(size(x)) - 2)))


@converts("InstanceNormalization")
def _instance_norm(c: Call) -> fx.Node:
    return _grouped_norm(c, size(c.node(0))[1])


@converts("GroupNormalization", since=21)
def _group_norm(c: Call) -> fx.Node:
    return _grouped_norm(c, c.attribute("num_groups"))


def _grouped_norm(c: Call, groups: Any) -> fx.Node:
    """A layer norm over each group's channels and positions; weight and bias are per channel."""
    x = c.node(0)
    shape = size(x)
    grouped = c.reshape(x, (shape[0], groups, product(shape[1:]) // groups))
    result = c.reshape(c.build.layer_norm(grouped, eps=epsilon(c, 1e-5)), shape)
    result = result if _holds_only(c, 1, 1.0) else c.build.mul(result, _channel(c, x, c.node(1)))
    return result if _holds_only(c, 2, 0.0) else c.build.add(result, _channel(c, x, c.node(2)))


def _holds_only(c: Call, i: int, number: float) -> bool:
    """Whether operand i is known to be this number everywhere: exporters fill in weights that a norm lacks."""
    known = c.known(i)
    return known is not None and known.tensor is not None and bool((known.tensor == number).all())


@converts("LpNormalization")
def _lp_norm(c: Call) -> fx.Node:
    x = c.node(0)
    axis, p = c.axis(c.attribute("axis", -1), len(size(x))), c.attribute("p", 2)
    if p not in (1, 2):
        raise c.refuse(f"is of order {p}", why="orders 1 and 2 are known")
    powers = c.build.abs(x) if p == 1 else c.build.mul(x, x)
    norm = c.build.sum(powers, dims=(axis,), keepdim=True)
    norm = c.build.where(c.build.eq(norm, 0.0), 1.0, norm)  # where all is zero, so is the result
    return c.build.div(x, norm if p == 1 else c.build.sqrt(norm))


# -- attention


@converts("Attention", since=23)
def _attention(c: Call) -> Any:
    """[B, H, T, D], or [B, T, H*D] with the number of heads as an attribute."""
    if any(c.given(i) for i in (4, 5)) or any(c.operator.outputs[1:]):
        raise c.refuse("keeps keys and values", fix="export the model without a cache (use_cache=False)")
    q, k, v = (c.node(i) for i in range(3))
    split = len(size(q)) == 4
    heads = size(q)[1] if split else c.attribute("q_num_heads")
    kv_heads = size(k)[1] if split else c.attribute("kv_num_heads")
    if split:
        q, k, v = (merge_heads(c.build, x) for x in (q, k, v))
    tq, tk = size(q)[1], size(k)[1]
    scale = c.attribute("scale", 1 / math.sqrt(size(q)[2] // heads))
    mask = spread(c, c.node(3), (1,) * 4) if c.given(3) else None
    causal = bool(c.attribute("is_causal", 0))
    if causal and tq != tk:  # the standard aligns the triangle at the top left
        mask, causal = _with_triangle(c, mask, tq, tk), False
    cap = {"softcap": c.attribute("softcap", 0.0)} if c.attribute("softcap", 0.0) else {}
    out = c.build.attention(q, k, v, mask, heads=heads, kv_heads=kv_heads, scale=scale, causal=causal, **cap)
    return split_heads(c.build, out, heads) if split else out


def _with_triangle(c: Call, mask: fx.Node | None, tq: int | Dim, tk: int | Dim) -> fx.Node:
    rows = c.build.reshape(c.build.arange(end=tq), shape=(tq, 1))
    seen = c.reshape(c.build.le(c.build.arange(end=tk), rows), (1, 1, tq, tk))
    if mask is None:
        return seen
    if value(mask).dtype == "bool":
        return c.build.logical_and(mask, seen)
    return c.build.add(mask, c.build.where(seen, 0.0, float("-inf")))


@converts("RotaryEmbedding", since=23)
def _rotary(c: Call) -> fx.Node:
    return rotate(c, cos=1, sin=2, positions=3, domain=STANDARD)


def rotate(c: Call, cos: int, sin: int, positions: int, domain: str) -> fx.Node:
    """x [B, H, T, D] or [B, T, H*D]; tables [rows, R/2] with positions, or one [B, T, R/2] for each token."""
    x = c.node(0)
    split = len(size(x)) == 4
    rotated = c.attribute("rotary_embedding_dim", 0) or 2 * size(c.require(cos))[-1]
    heads = size(x)[1] if split else c.attribute("num_heads", 0)
    if not heads:
        if domain == STANDARD or c.attribute("rotary_embedding_dim", 0):
            raise c.refuse("does not say how many heads there are")
        heads = size(x)[-1] // rotated
    merged = merge_heads(c.build, x) if split else x
    interleaved = bool(c.attribute("interleaved", 0))
    tables = [_angles(c, i, positions, merged, interleaved) for i in (cos, sin)]
    out = c.build.rotary_embedding(merged, *tables, heads=heads, interleaved=interleaved)
    return split_heads(c.build, out, heads) if split else out


def _angles(c: Call, i: int, positions: int, x: fx.Node, interleaved: bool) -> fx.Node:
    """[B or 1, T, R]: each angle for both members of its pair."""
    table = c.node(i)
    if c.given(positions):
        ids = non_negative(c, c.require(positions), size(table)[0])
        if len(size(ids)) == 1:  # where the first token is
            ids = c.build.add(c.reshape(ids, (1, 1)), c.build.arange(end=size(x)[1]))
        table = c.build.embedding(ids, table)
    batch, length, half = size(table)
    if not interleaved:
        return c.build.concat((table, table), dim=2)
    twice = c.build.expand(c.reshape(table, (batch, length, half, 1)), shape=(batch, length, half, 2))
    return c.reshape(twice, (batch, length, 2 * half))
