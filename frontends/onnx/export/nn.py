"""The operations a Transformer is made of as ONNX operators, in the forms that other engines fuse."""

from __future__ import annotations

from tersor.frontends.onnx.export.attention import split_heads
from tersor.frontends.onnx.export.layout import cut
from tersor.frontends.onnx.export.table import Export, exports
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
