"""ONNX operators that reduce axes."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from tersor.frontends.onnx.table import Call, converts, dtype, size, value
from tersor.ir.dims import product


def _reduces(reduce: Callable[[Call, fx.Node, tuple[int, ...], bool], fx.Node]) -> Callable[[Call], fx.Node]:
    """Axes are the attribute ``axes``, or the second operand in later opsets; none given means all."""

    def convert(c: Call) -> fx.Node:
        x = c.node(0)
        axes = c.axes(1, len(size(x)))
        if not axes and c.attribute("noop_with_empty_axes", 0) == 1:
            # every element by itself: ReduceL1 is its magnitude then
            return reduce(c, c.reshape(x, (*size(x), 1)), (len(size(x)),), False)
        axes = axes or tuple(range(len(size(x))))
        return reduce(c, x, axes, bool(c.attribute("keepdims", 1)))

    return convert


def _same_type(name: str) -> Callable[[Call, fx.Node, tuple[int, ...], bool], fx.Node]:
    return lambda c, x, axes, keep: c.cast(c.build.emit(name, x, dims=axes, keepdim=keep), value(x).dtype)


for _onnx, _ours in (
    ("ReduceMean", "mean"),
    ("ReduceSum", "sum"),
    ("ReduceMax", "amax"),
    ("ReduceMin", "amin"),
):
    converts(_onnx)(_reduces(_same_type(_ours)))


@converts("ReduceSumSquare")
@_reduces
def _sum_square(c: Call, x: fx.Node, axes: tuple[int, ...], keep: bool) -> fx.Node:
    return c.cast(c.build.sum(c.build.mul(x, x), dims=axes, keepdim=keep), value(x).dtype)


@converts("ReduceL2")
@_reduces
def _l2(c: Call, x: fx.Node, axes: tuple[int, ...], keep: bool) -> fx.Node:
    return c.cast(c.build.sqrt(c.build.sum(c.build.mul(x, x), dims=axes, keepdim=keep)), value(x).dtype)


@converts("ReduceL1")
@_reduces
def _l1(c: Call, x: fx.Node, axes: tuple[int, ...], keep: bool) -> fx.Node:
    return c.cast(c.build.sum(c.build.abs(x), dims=axes, keepdim=keep), value(x).dtype)


@converts("ReduceLogSumExp")
@_reduces
def _log_sum_exp(c: Call, x: fx.Node, axes: tuple[int, ...], keep: bool) -> fx.Node:
    top = c.build.amax(x, dims=axes, keepdim=True)
    total = c.build.sum(c.build.exp(c.build.sub(x, top)), dims=axes, keepdim=keep)
    return c.cast(c.build.add(c.build.log(total), c.reshape(top, size(total))), value(x).dtype)


@converts("ArgMax")
def _argmax(c: Call) -> fx.Node:
    return _position_of_largest(c, c.node(0))


@converts("ArgMin")
def _argmin(c: Call) -> fx.Node:
    return _position_of_largest(c, c.build.neg(c.node(0)))


def _position_of_largest(c: Call, x: fx.Node) -> fx.Node:
    if c.attribute("select_last_index", 0):
        raise c.refuse("asks for the last of equal values", why="the dialect finds the first")
    axis = c.axis(c.attribute("axis", 0), len(size(x)))
    return c.build.argmax(x, dim=axis, keepdim=bool(c.attribute("keepdims", 1)))


@converts("Softmax", since=13)
def _softmax(c: Call) -> fx.Node:
    x = c.node(0)
    return c.build.softmax(x, dim=c.axis(c.attribute("axis", -1), len(size(x))))


@converts("LogSoftmax", since=13)
def _log_softmax(c: Call) -> fx.Node:
    x = c.node(0)
    return c.build.log_softmax(x, dim=c.axis(c.attribute("axis", -1), len(size(x))))


@converts("Softmax")
def _flat_softmax(c: Call) -> fx.Node:
    return _flattened(c, "softmax")


@converts("LogSoftmax")
def _flat_log_softmax(c: Call) -> fx.Node:
    return _flattened(c, "log_softmax")


def _flattened(c: Call, name: str) -> fx.Node:
    """Before opset 13: over all axes from ``axis`` on, taken as one."""
    x = c.node(0)
    shape = size(x)
    axis = c.axis(c.attribute("axis", 1), len(shape))
    if axis == len(shape) - 1:
        return c.build.emit(name, x, dim=axis)
    flat = c.reshape(x, (*shape[:axis], product(shape[axis:])))
    return c.reshape(c.build.emit(name, flat, dim=axis), shape)


@converts("GlobalAveragePool")
def _global_average_pool(c: Call) -> fx.Node:
    x = c.node(0)
    return c.build.mean(x, dims=tuple(range(2, len(size(x)))), keepdim=True)


@converts("GlobalMaxPool")
def _global_max_pool(c: Call) -> fx.Node:
    x = c.node(0)
    return c.build.amax(x, dims=tuple(range(2, len(size(x)))), keepdim=True)


@converts("Hardmax", since=13)
def _hardmax(c: Call) -> fx.Node:
    """1 at the first largest value along an axis, 0 elsewhere."""
    x = c.node(0)
    axis = c.axis(c.attribute("axis", -1), len(size(x)))
    first = c.build.argmax(x, dim=axis, keepdim=True)
    length = size(x)[axis]
    places = c.build.reshape(c.build.arange(end=length), shape=(length, *(1,) * (len(size(x)) - 1 - axis)))
    return c.cast(c.build.eq(places, first), dtype(c.require(0)))
