"""Operations that move or make data as ONNX operators."""

from __future__ import annotations

from tersor.frontends.onnx.export.table import Export, exports
from tersor.ir import Dim
from tersor.ir.dims import Shape

_END = (1 << 63) - 1  # "to the end" of an axis


@exports("reshape")
def _reshape(e: Export) -> str:
    return e.reshape(e.operand(0), e.value(0).shape, e.result.shape)


@exports("permute")
def _permute(e: Export) -> str:
    return e.permute(e.operand(0), e.attribute("dims"))


@exports("expand")
def _expand(e: Export) -> str:
    return expand(e, e.operand(0), e.value(0).shape, e.result.shape)


def expand(e: Export, x: str, have: Shape, want: Shape) -> str:
    """x of shape ``have`` broadcast to ``want``; ONNX keeps what is wanted of size 1."""
    lead = len(want) - len(have)
    sizes = [1 if i >= lead and have[i - lead] == size else size for i, size in enumerate(want)]
    if lead == 0 and all(size == 1 for size in sizes):
        return x
    return e.emit("Expand", x, e.sizes(sizes))


@exports("slice")
def _slice(e: Export) -> str:
    axis = e.axis(0)
    start, end, step = (e.attribute(name) for name in ("start", "end", "step"))
    return cut(e, e.operand(0), axis, start, None if end == e.value(0).shape[axis] else end, step)


def cut(e: Export, x: str, axis: int, start: int | Dim, end: int | Dim | None, step: int = 1) -> str:
    """Elements from ``start`` on, before ``end`` or to the end of the axis."""
    ends = e.sizes((_END,)) if end is None else e.sizes((end,))
    steps = [] if step == 1 else [e.sizes((step,))]
    return e.emit("Slice", x, e.sizes((start,)), ends, e.sizes((axis,)), *steps)


@exports("concat")
def _concat(e: Export) -> str:
    parts = e.argument(0)
    axis = e.attribute("dim") % e.result.rank
    return e.emit("Concat", *(e.read(part) for part in parts), axis=axis)


@exports("pad")
def _pad(e: Export) -> str:
    pads, rank = e.attribute("pads"), e.value(0).rank
    before, after = [0] * rank, [0] * rank
    for i in range(len(pads) // 2):  # from the last axis backwards
        before[rank - 1 - i], after[rank - 1 - i] = pads[2 * i], pads[2 * i + 1]
    fill = e.constant(e.attribute("value"), e.result.dtype)
    return e.emit("Pad", e.operand(0), e.sizes((*before, *after)), fill, mode="constant")


@exports("index_select")
def _index_select(e: Export) -> str:
    return e.emit("Gather", e.operand(0), e.operand(1), axis=e.axis(0))


@exports("gather")
def _gather(e: Export) -> str:
    return e.emit("GatherElements", e.operand(0), e.operand(1), axis=e.axis(0))


@exports("scatter")
def _scatter(e: Export) -> str:
    reduction = {"amax": "max", "amin": "min"}.get(e.attribute("reduce"), e.attribute("reduce"))
    operands = (e.operand(i) for i in range(3))
    return e.emit("ScatterElements", *operands, axis=e.axis(0), reduction=reduction)


@exports("arange")
def _arange(e: Export) -> str:
    return e.cast(arange(e, e.attribute("end")), "int64", e.attribute("dtype"))


def arange(e: Export, end: int | Dim) -> str:
    """0, 1, ..., end - 1 as int64."""
    return e.emit("Range", e.constant(0, "int64"), scalar(e, end), e.constant(1, "int64"))


def scalar(e: Export, size: int | Dim) -> str:
    """A size as a value of rank 0."""
    if isinstance(size, int):
        return e.constant(size, "int64")
    return e.emit("Squeeze", e.sizes((size,)), e.sizes((0,)))


@exports("full")
def _full(e: Export) -> str:
    fill, dtype, shape = e.attribute("value"), e.attribute("dtype"), e.attribute("shape")
    one = e.cast(scalar(e, fill), "int64", dtype) if isinstance(fill, Dim) else e.constant(fill, dtype)
    return e.emit("Expand", one, e.sizes(shape)) if shape else one


@exports("cumsum")
def _cumsum(e: Export) -> str:
    return e.emit("CumSum", e.operand(0, e.result.dtype), e.constant(e.axis(0), "int64"))


@exports("cache_update")
def _cache_update(e: Export) -> str:
    axis, value, position = e.axis(0), e.value(1), e.value(2)
    places = e.operand(2)
    if not position.rank:
        places = e.emit("Add", arange(e, value.shape[axis]), places)
    lined_up = tuple(size if i == axis else 1 for i, size in enumerate(value.shape))
    places = e.reshape(places, value.shape[axis : axis + 1], lined_up)
    places = expand(e, places, lined_up, value.shape)
    return e.emit("ScatterElements", e.operand(0), places, e.operand(1), axis=axis)
