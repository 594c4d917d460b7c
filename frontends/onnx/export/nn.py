"""The operations a Transformer is made of as ONNX operators, in the forms that other engines fuse."""

from __future__ import annotations

from functools import partial

import torch
from torch import fx

from tersor.frontends.onnx.export.layout import arange, cut, expand, scalar
from tersor.frontends.onnx.export.table import Export, exports
from tersor.ir import Dim
from tersor.ir.dims import Shape


@exports("linear")
def _linear(e: Export) -> str:
    """x @ W' + bias; W is stored transposed where only products read it."""
    return _product(e, "MatMul")


@exports("integer_linear")
def _integer_linear(e: Export) -> str:
    return _product(e, "MatMulInteger")


def _product(e: Export, operator: str) -> str:
    name = e.operand(1)
    weight = name if name in e.writer.transposed else e.permute(name, (1, 0))
    product = e.emit(operator, e.operand(0), weight)
    return e.emit("Add", product, e.operand(2)) if e.given(2) else product


@exports("matmul")
def _matmul(e: Export) -> str:
    return e.emit("MatMul", e.operand(0), e.operand(1))


@exports("layer_norm")
def _layer_norm(e: Export) -> str:
    """LayerNormalization has to have a weight: one of ones, without a name, stands for none."""
    ones = e.constant([1.0] * e.result.shape[-1], e.result.dtype)
    weight = e.operand(1) if e.given(1) else ones
    return e.emit(
        "LayerNormalization", e.operand(0), weight, e.optional(2), axis=-1, epsilon=e.attribute("eps")
    )


@exports("rms_norm")
def _rms_norm(e: Export) -> str:
    x, dtype = e.operand(0), e.result.dtype
    mean = e.emit("ReduceMean", e.emit("Pow", x, e.constant(2.0, dtype)), e.sizes((-1,)), keepdims=1)
    root = e.emit("Sqrt", e.emit("Add", mean, e.constant(e.attribute("eps"), dtype)))
    normed = e.emit("Div", x, root)
    return e.emit("Mul", normed, e.operand(1)) if e.given(1) else normed


@exports("embedding")
def _embedding(e: Export) -> str:
    return e.emit("Gather", e.operand(1), e.operand(0), axis=0)


@exports("conv1d")
def _conv1d(e: Export) -> str:
    return _conv(e, *((e.attribute(name),) for name in ("stride", "padding", "dilation")))


@exports("conv2d")
def _conv2d(e: Export) -> str:
    return _conv(e, *(e.attribute(name) for name in ("stride", "padding", "dilation")))


def _conv(e: Export, stride: tuple[int, ...], padding: tuple[int, ...], dilation: tuple[int, ...]) -> str:
    return e.emit(
        "Conv", e.operand(0), e.operand(1), e.optional(2), strides=list(stride), pads=[*padding, *padding],
        dilations=list(dilation), group=e.attribute("groups"), kernel_shape=list(e.value(1).shape[2:]),
    )  # fmt: skip


# -- attention


@exports("attention")
def _attention(e: Export) -> str:
    """MatMul, Mul, Add, Softmax, MatMul over [B, H, T, D]; for a soft cap Div, Tanh, Mul before the Add. With products
    in bf16 the Softmax is spelled out around the second MatMul."""
    heads, kv_heads, dtype = e.attribute("heads"), e.attribute("kv_heads"), e.result.dtype
    batch, tq, tk = e.value(0).shape[0], e.value(0).shape[1], e.value(1).shape[1]
    narrow = e.attribute("products") == "bfloat16"
    rounded = partial(_rounded, e) if narrow else lambda x: x
    q = rounded(split_heads(e, e.argument(0), heads))
    k, v = (rounded(_repeated(e, i, kv_heads, heads // kv_heads)) for i in (1, 2))
    scores = e.emit("MatMul", q, e.permute(k, (0, 1, 3, 2)))
    if e.attribute("scale") != 1:
        scores = e.emit("Mul", scores, e.constant(e.attribute("scale"), dtype))
    if (softcap := e.attribute("softcap")) is not None:
        cap = e.constant(softcap, dtype)
        scores = e.emit("Mul", e.emit("Tanh", e.emit("Div", scores, cap)), cap)
    mask, may_hide_all = _mask(e, tq, tk)
    scores = e.emit("Add", scores, mask) if mask else scores
    if narrow:  # what is rounded is not divided yet
        weights = e.emit(
            "Exp", e.emit("Sub", scores, e.emit("ReduceMax", scores, e.sizes((-1,)), keepdims=1))
        )
        total = e.emit("ReduceSum", weights, e.sizes((-1,)), keepdims=1)
        out = e.emit("Div", e.emit("MatMul", rounded(weights), v), total)
        if may_hide_all:  # a row that hides every key gives 0, here infinity less infinity
            out = e.emit("Where", e.emit("IsNaN", total), e.constant(0.0, dtype), out)
    else:
        chances = e.emit("Softmax", scores, axis=-1)
        if may_hide_all:  # here 0 / 0
            chances = e.emit("Where", e.emit("IsNaN", chances), e.constant(0.0, dtype), chances)
        out = e.emit("MatMul", chances, v)
    out = e.permute(out, (0, 2, 1, 3))
    size = e.result.shape[2] // heads
    return e.reshape(out, (batch, tq, heads, size), e.result.shape)


def _rounded(e: Export, x: str) -> str:
    """Values rounded to bf16, in their own type."""
    narrow = e.emit("Cast", x, to=e.writer.type_code("bfloat16"))
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
    if not e.given(3):
        return (_added(e, triangle) if triangle else ""), empty_rows
    mask, stored = e.operand(3), e.parameter(3)
    if e.value(3).dtype == "bool":
        return _added(e, e.emit("And", mask, triangle) if triangle else mask), True
    if triangle:
        mask = e.emit("Add", mask, _added(e, triangle))
    finite = stored is not None and bool(torch.isfinite(stored).all())
    return e.cast(mask, e.value(3).dtype, dtype), empty_rows or not finite


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


@exports("rotary_embedding")
def _rotary_embedding(e: Export) -> str:
    """x * cos + turned(x) * sin over [B, H, T, D]."""
    heads, (batch, length, width) = e.attribute("heads"), e.result.shape
    size, rotated = width // heads, e.value(1).shape[2]
    x = split_heads(e, e.argument(0), heads)
    head = x if rotated == size else cut(e, x, 3, 0, rotated)
    cos, sin = (e.emit("Unsqueeze", e.operand(i), e.sizes((1,))) for i in (1, 2))
    turned = (_turned_pairs if e.attribute("interleaved") else _turned_halves)(
        e, head, (batch, heads, length, rotated)
    )
    out = e.emit("Add", e.emit("Mul", head, cos), e.emit("Mul", turned, sin))
    if rotated < size:
        out = e.emit("Concat", out, cut(e, x, 3, rotated, size), axis=3)
    e.writer.split[e.node, heads] = out
    return e.reshape(e.permute(out, (0, 2, 1, 3)), (batch, length, heads, size), e.result.shape)


def _turned_halves(e: Export, x: str, shape: Shape) -> str:
    middle = shape[3] // 2
    first, second = cut(e, x, 3, 0, middle), cut(e, x, 3, middle, shape[3])
    return e.emit("Concat", e.emit("Neg", second), first, axis=3)


def _turned_pairs(e: Export, x: str, shape: Shape) -> str:
    even, odd = (cut(e, x, 3, start, shape[3], 2) for start in (0, 1))
    even, odd = (e.emit("Unsqueeze", half, e.sizes((4,))) for half in (even, odd))
    pairs = e.emit("Concat", e.emit("Neg", odd), even, axis=4)
    return e.reshape(pairs, (*shape[:3], shape[3] // 2, 2), shape)
