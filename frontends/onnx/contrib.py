"""onnxruntime's own operators, which its optimiser and its exporters put into files of encoders.

Source: docs/ContribOperators.md of onnxruntime.
"""

from __future__ import annotations

import math
from typing import Any

from torch import fx

from tersor.frontends.onnx.layout import non_negative, spread
from tersor.frontends.onnx.nn import epsilon, rotate, scaled
from tersor.frontends.onnx.table import MICROSOFT, Call, converts, size, value


@converts("Gelu", domain=MICROSOFT)
def _gelu(c: Call) -> fx.Node:
    return c.build.gelu(c.node(0))


@converts("BiasGelu", domain=MICROSOFT)
def _bias_gelu(c: Call) -> fx.Node:
    return c.build.gelu(c.build.add(c.node(0), c.node(1)))


@converts("FastGelu", domain=MICROSOFT)
def _fast_gelu(c: Call) -> fx.Node:
    x = c.build.add(c.node(0), c.node(1)) if c.given(1) else c.node(0)
    return c.build.gelu_tanh(x)


@converts("QuickGelu", domain=MICROSOFT)
def _quick_gelu(c: Call) -> fx.Node:
    x, alpha = c.node(0), c.attribute("alpha", 1.702)
    return c.build.mul(x, c.build.sigmoid(scaled(c, x, alpha)))


@converts("FusedMatMul", domain=MICROSOFT)
def _fused_matmul(c: Call) -> fx.Node:
    if c.attribute("transBatchA", 0) or c.attribute("transBatchB", 0):
        raise c.refuse("transposes batch axes")
    x, y = c.node(0), c.node(1)
    x = _transposed(c, x) if c.attribute("transA", 0) else x
    y = _transposed(c, y) if c.attribute("transB", 0) else y
    return scaled(c, c.build.matmul(x, y), c.attribute("alpha", 1.0))


def _transposed(c: Call, x: fx.Node) -> fx.Node:
    rank = len(size(x))
    return c.build.permute(x, dims=(*range(rank - 2), rank - 1, rank - 2))


@converts("SkipLayerNormalization", domain=MICROSOFT)
def _skip_layer_norm(c: Call) -> tuple[Any, ...]:
    """layer_norm(x + skip + bias); the sum is the fourth result."""
    total = _sum(c, 0, 1, 4)
    return c.build.layer_norm(total, c.node(2), c.optional(3), eps=epsilon(c, 1e-12)), None, None, total


@converts("SkipSimplifiedLayerNormalization", domain=MICROSOFT)
def _skip_rms_norm(c: Call) -> tuple[Any, ...]:
    total = _sum(c, 0, 1, 3)
    return c.build.rms_norm(total, c.node(2), eps=epsilon(c, 1e-12)), None, None, total


def _sum(c: Call, x: int, skip: int, bias: int) -> fx.Node:
    total = c.build.add(c.node(x), c.node(skip))
    return c.build.add(total, c.node(bias)) if c.given(bias) else total


@converts("EmbedLayerNormalization", domain=MICROSOFT)
def embed_layer_norm(c: Call) -> tuple[Any, ...]:
    """Word, position and segment embeddings, summed and normalised; the number of tokens that the mask shows; the
    sum."""
    words = c.build.embedding(non_negative(c, c.require(0), 0), c.node(2))
    batch, length, _ = size(words)
    if c.given(8):
        positions = c.build.embedding(non_negative(c, c.require(8), 0), c.node(3))
    else:
        positions = c.build.embedding(c.reshape(c.build.arange(end=length), (1, length)), c.node(3))
    total = c.build.add(words, positions)
    if c.given(1):
        total = c.build.add(total, c.build.embedding(non_negative(c, c.require(1), 0), c.node(4)))
    normed = c.build.layer_norm(total, c.node(5), c.node(6), eps=epsilon(c, 1e-12))
    if c.given(7):
        shown = c.cast(c.build.sum(c.node(7), dims=(1,)), "int32")
    else:
        shown = c.build.full(shape=(batch,), value=0, dtype="int32")
    return normed, shown, total


@converts("RotaryEmbedding", domain=MICROSOFT)
def _rotary(c: Call) -> fx.Node:
    if c.attribute("scale", 1.0) != 1.0 or c.attribute("is_packed_batching", 0):
        raise c.refuse("scales its angles, or packs its batch")
    return rotate(c, cos=2, sin=3, positions=1, domain=MICROSOFT)


@converts("Attention", domain=MICROSOFT)
def _attention(c: Call) -> Any:
    """One product for queries, keys and values, then attention: input, weight, bias, mask, past, added scores."""
    if c.given(4):
        raise c.refuse("keeps keys and values", fix="export the model without a cache")
    projected = c.build.matmul(c.node(0), c.node(1))
    projected = c.build.add(projected, c.node(2)) if c.given(2) else projected
    return attention(c, projected, mask=3, added=5)


def attention(c: Call, projected: fx.Node, mask: int, added: int | None) -> fx.Node:
    """Attention between the parts of one projection, with a mask and added scores among the operator's operands."""
    if any(c.operator.outputs[1:]) or c.attribute("do_rotary", 0):
        raise c.refuse("keeps keys and values, or rotates", fix="export the model without a cache")
    width = size(projected)[2]
    sizes = c.attribute("qkv_hidden_sizes") or [width // 3] * 3
    parts, start = [], 0
    for length in sizes:
        parts.append(c.slice(projected, 2, start, start + length))
        start += length
    seen = _mask(c, mask, size(projected)[0], size(projected)[1])
    return _attend(c, *parts, seen, added)


@converts("MultiHeadAttention", domain=MICROSOFT)
def _multi_head_attention(c: Call) -> Any:
    """query, key, value, bias, key padding mask, added scores, past."""
    if any(c.given(i) for i in range(6, len(c.inputs))) or any(c.operator.outputs[1:]):
        raise c.refuse("keeps keys and values", fix="export the model without a cache")
    if not (c.given(1) and c.given(2)) or any(len(size(c.require(i))) != 3 for i in range(3)):
        raise c.refuse("has packed operands", why="queries, keys and values of [B, T, H*D] are known")
    parts = [c.node(i) for i in range(3)]
    if c.given(3):
        start, biased = 0, []
        for x in parts:
            bias = c.slice(c.node(3), 0, start, start + size(x)[2])
            biased.append(c.build.add(x, bias))
            start += size(x)[2]
        parts = biased
    mask = _mask(c, 4, size(parts[1])[0], size(parts[1])[1])
    return _attend(c, *parts, mask, added=5)


def _mask(c: Call, i: int, batch: Any, length: Any) -> fx.Node | None:
    """A boolean mask of rank 4 from integers: [B] lengths, [B, Tk], [B, Tq, Tk] or [B, 1, Tq, Tk], 0 = hidden."""
    if not c.given(i):
        return None
    mask = c.node(i)
    shape = size(mask)
    if len(shape) == 1:
        if shape != (batch,):
            raise c.refuse(f"has a mask of {value(mask)}", why="lengths, one for each row, are known")
        seen = c.build.lt(
            c.build.arange(end=length), c.build.reshape(c.cast(mask, "int64"), shape=(*shape, 1))
        )
        return c.reshape(seen, (batch, 1, 1, length))
    seen = mask if value(mask).dtype == "bool" else c.build.ne(mask, 0)
    if len(shape) == 4:
        return seen
    return c.reshape(seen, (shape[0], 1, 1, shape[1]) if len(shape) == 2 else (shape[0], 1, *shape[1:]))


def _attend(c: Call, q: fx.Node, k: fx.Node, v: fx.Node, mask: fx.Node | None, added: int | None) -> fx.Node:
    heads = c.attribute("num_heads")
    scale = c.attribute("scale", 0.0) or 1 / math.sqrt(size(q)[2] // heads)
    if added is not None and c.given(added):
        scores = spread(c, c.node(added), (1,) * 4)
        mask = scores if mask is None else c.build.add(scores, c.build.where(mask, 0.0, float("-inf")))
    causal = bool(c.attribute("unidirectional", 0))
    return c.build.attention(q, k, v, mask, heads=heads, kv_heads=heads, scale=scale, causal=causal)
