"""Attention as ONNX operators, in the forms that other engines fuse."""

from __future__ import annotations

from functools import partial

import torch
from torch import fx

from tersor.frontends.onnx.export.layout import arange, expand, scalar
from tersor.frontends.onnx.export.table import Export, exports
from tersor.ir import Dim
from tersor.ir.opset.attention import FP16_LIMIT, WEIGHT_CODES


@exports("attention")
def _attention(e: Export) -> str:
    """MatMul, Mul, Add, Softmax, MatMul over [B, H, T, D]; for a soft cap Div, Tanh, Mul before the Add. With products
    in fewer bits the Softmax is spelled out around the second MatMul."""
    heads, kv_heads, dtype = e.attribute("heads"), e.attribute("kv_heads"), e.result.dtype
    products = e.attribute("products")
    rounded = partial(_rounded, e, products) if products in ("bfloat16", "float16") else lambda x: x
    q, scale = split_heads(e, e.argument(0), heads), e.attribute("scale")
    if products == "float16" and scale != 1:
        q, scale = e.emit("Mul", q, e.constant(scale, dtype)), 1
    q = rounded(q)
    k, v = (rounded(_repeated(e, i, kv_heads, heads // kv_heads)) for i in (1, 2))
    scores = e.emit("MatMul", q, e.permute(k, (0, 1, 3, 2)))
    if scale != 1:
        scores = e.emit("Mul", scores, e.constant(scale, dtype))
    scores, may_hide_all = _masked(e, scores)
    if products != "float32":
        weights, total = _weights(e, scores, coded=products == "uint8")
        out = e.emit("Div", e.emit("MatMul", rounded(weights), v), total)
        out = _zeros_where_hidden(e, out, total) if may_hide_all else out
    else:
        chances = e.emit("Softmax", scores, axis=-1)
        if may_hide_all:  # here 0 / 0
            chances = _zeros_where_hidden(e, chances, chances)
        out = e.emit("MatMul", chances, v)
    return _merged(e, out)


@exports("integer_attention")
def _integer_attention(e: Export) -> str:
    """Both products as MatMul of whole numbers in float32, exact for sums below 2^24."""
    heads, kv_heads = e.attribute("heads"), e.attribute("kv_heads")
    repeats = heads // kv_heads

    def signed(codes: str) -> str:
        return e.emit("Sub", e.cast(codes, "uint8", "float32"), e.constant(128.0, "float32"))

    q = signed(split_heads(e, e.argument(0), heads))
    k, v = (signed(_repeated(e, i, kv_heads, repeats)) for i in (1, 2))
    by_head = e.reshape(e.operand(3), (heads,), (heads, 1, 1))
    scores = e.emit("Mul", e.emit("MatMul", q, e.permute(k, (0, 1, 3, 2))), by_head)
    scores, may_hide_all = _masked(e, scores)
    weights, total = _weights(e, scores, coded=True)
    value_scale = e.reshape(e.operand(4), (kv_heads,), (kv_heads, 1, 1, 1))
    value_scale = expand(e, value_scale, (kv_heads, 1, 1, 1), (kv_heads, repeats, 1, 1))
    value_scale = e.reshape(value_scale, (kv_heads, repeats, 1, 1), (heads, 1, 1))
    out = e.emit("Mul", e.emit("MatMul", weights, v), e.emit("Div", value_scale, total))
    return _merged(e, _zeros_where_hidden(e, out, total) if may_hide_all else out)


def _masked(e: Export, scores: str) -> tuple[str, bool]:
    """Scores behind the soft cap and the mask, and whether a row of them may hide every key."""
    dtype = e.result.dtype
    if (softcap := e.attribute("softcap")) is not None:
        cap = e.constant(softcap, dtype)
        scores = e.emit("Mul", e.emit("Tanh", e.emit("Div", scores, cap)), cap)
    mask, may_hide_all = _mask(e, e.value(0).shape[1], e.value(1).shape[1])
    return e.emit("Add", scores, mask) if mask else scores, may_hide_all


def _weights(e: Export, scores: str, coded: bool) -> tuple[str, str]:
    """exp(score - largest score) of each row, in codes of 1/255 if ``coded``, and its sum; NaN where all is hidden."""
    largest = e.emit("ReduceMax", scores, e.sizes((-1,)), keepdims=1)
    weights = e.emit("Exp", e.emit("Sub", scores, largest))
    if coded:
        weights = e.emit("Round", e.emit("Mul", weights, e.constant(float(WEIGHT_CODES), e.result.dtype)))
    return weights, e.emit("ReduceSum", weights, e.sizes((-1,)), keepdims=1)


def _zeros_where_hidden(e: Export, x: str, mark: str) -> str:
    """A row that hides every key gives 0; it is marked by NaN, of infinity less infinity."""
    return e.emit("Where", e.emit("IsNaN", mark), e.constant(0.0, e.result.dtype), x)


def _merged(e: Export, out: str) -> str:
    """[B, H, T, D] -> [B, T, H*D]."""
    batch, length, width = e.result.shape
    heads = e.attribute("heads")
    return e.reshape(e.permute(out, (0, 2, 1, 3)), (batch, length, heads, width // heads), e.result.shape)


def _rounded(e: Export, dtype: str, x: str) -> str:
    """Values rounded to bf16 or fp16, in their own type; those beyond fp16's range are limited to it."""
    if dtype == "float16":
        limits = (e.constant(sign * FP16_LIMIT, e.result.dtype) for sign in (-1, 1))
        x = e.emit("Clip", x, *limits)
    narrow = e.emit("Cast", x, to=e.writer.type_code(dtype))
    return e.emit("Cast", narrow, to=e.writer.type_code(e.result.dtype))


def split_heads(e: Export, x: fx.Node, heads: int) -> str:
    """[B, T, H*D] -> [B, H, T, D]."""
    if (x, heads) in e.writer.split:
        return e.writer.split[x, heads]
    shape = batch, length, width = x.meta["value"].shape
    return e.permute(e.reshape(e.read(x), shape, (batch, length, heads, width // heads)), (0, 2, 1, 3))


def _repeated(e: Export, i: int, heads: int, times: int) -> str:
    """Keys or values [B, H, T, D] with each head repeated for the queries that share it."""
    x = split_heads(e, e.argument(i), heads)
    if times == 1:
        return x
    batch, length, width = e.value(i).shape
    apart, wide = ((batch, heads, n, length, width // heads) for n in (1, times))
    x = expand(e, e.emit("Unsqueeze", x, e.sizes((2,))), apart, wide)
    return e.reshape(x, wide, (batch, heads * times, length, width // heads))


def _mask(e: Export, tq: int | Dim, tk: int | Dim) -> tuple[str, bool]:
    """What is added to the scores ("" for nothing), and whether a row of it may hide every key."""
    dtype = e.result.dtype
    triangle = _triangle(e, tq, tk)
    ahead = tk - tq
    empty_rows = bool(triangle) and not (isinstance(ahead, int) and ahead >= 0)
    at = e.node.target.operands.index("mask")
    if not e.given(at):
        return (_added(e, triangle) if triangle else ""), empty_rows
    mask, stored = e.operand(at), e.parameter(at)
    if e.value(at).dtype == "bool":
        return _added(e, e.emit("And", mask, triangle) if triangle else mask), True
    if triangle:
        mask = e.emit("Add", mask, _added(e, triangle))
    finite = stored is not None and bool(torch.isfinite(stored).all())
    return e.cast(mask, e.value(at).dtype, dtype), empty_rows or not finite


def _added(e: Export, seen: str) -> str:
    """0 where a key is seen, minus infinity where it is not."""
    zero, hidden = (e.constant(x, e.result.dtype) for x in (0.0, float("-inf")))
    return e.emit("Where", seen, zero, hidden)


def _triangle(e: Export, tq: int | Dim, tk: int | Dim) -> str:
    """[Tq, Tk]: which keys a query sees by its position; "" when that is all of them."""
    causal, window = e.attribute("causal"), e.attribute("window")
    if not causal and window is None:
        return ""
    columns = arange(e, tk)
    rows = e.emit("Unsqueeze", arange(e, tq), e.sizes((1,)))
    rows = rows if tk == tq else e.emit("Add", rows, scalar(e, tk - tq))
    seen = e.emit("LessOrEqual", columns, rows) if causal else ""
    if window is None:
        return seen
    near = e.emit("Greater", columns, e.emit("Sub", rows, e.constant(window, "int64")))
    return e.emit("And", seen, near) if seen else near
