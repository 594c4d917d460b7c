"""ONNX operators that order elements, or write some of them."""

from __future__ import annotations

from torch import fx

from tersor.frontends.onnx.layout import non_negative
from tersor.frontends.onnx.table import Call, converts, size, value
from tersor.ir import Dim
from tersor.ir.dims import product

_REDUCTIONS = {"none": "none", "add": "add", "mul": "mul", "max": "amax", "min": "amin"}


@converts("TopK", since=11)
def _topk(c: Call) -> tuple[fx.Node, fx.Node]:
    x, count = c.node(0), c.number(1)
    axis = c.axis(c.attribute("axis", -1), len(size(x)))
    order = c.build.argsort(x, dim=axis, descending=bool(c.attribute("largest", 1)))
    order = c.slice(order, axis, 0, count)
    return c.build.gather(x, order, dim=axis), order


@converts("ScatterElements", since=11)
def _scatter_elements(c: Call) -> fx.Node:
    x, source = c.node(0), c.node(2)
    axis = c.axis(c.attribute("axis", 0), len(size(x)))
    index = non_negative(c, c.require(1), size(x)[axis])
    return c.build.scatter(x, index, source, dim=axis, reduce=_reduction(c))


@converts("ScatterND", since=11)
def _scatter_nd(c: Call) -> fx.Node:
    """Each row of indices as one index into the flattened leading axes, whose slices are written."""
    x, index, updates = c.node(0), c.require(1), c.node(2)
    shape, (*lead, count) = size(x), size(index)
    if isinstance(count, Dim):
        raise c.refuse("indexes a dynamic number of axes")
    if not 0 < count <= len(shape):
        raise c.refuse(f"indexes {count} axes of {len(shape)}")
    index = c.cast(c.as_node(index), "int64")
    flat = None
    for axis in range(count):
        one = c.reshape(c.slice(index, len(lead), axis, axis + 1), lead)
        total = c.build.full(shape=(), value=shape[axis], dtype="int64")
        one = c.build.where(c.build.lt(one, 0), c.build.add(one, total), one)
        flat = one if flat is None else c.build.add(c.build.mul(flat, total), one)
    rows, tail = product(lead), shape[count:]
    place = c.expand(c.reshape(flat, (rows, *(1,) * len(tail))), (rows, *tail))
    made = c.build.scatter(
        c.reshape(x, (product(shape[:count]), *tail)),
        place,
        c.reshape(updates, (rows, *tail)),
        dim=0,
        reduce=_reduction(c),
    )
    return c.reshape(made, shape)


def _reduction(c: Call) -> str:
    name = c.attribute("reduction", "none")
    if name not in _REDUCTIONS:
        raise c.refuse(f"has the reduction {name!r}", why=f"{', '.join(_REDUCTIONS)} are known")
    return _REDUCTIONS[name]


@converts("DepthToSpace", since=11)
def _depth_to_space(c: Call) -> fx.Node:
    x, block = c.node(0), c.attribute("blocksize")
    batch, channels, height, width = size(x)
    depth = channels // (block * block)
    first = c.attribute("mode", "DCR") == "DCR"
    split = (
        (batch, block, block, depth, height, width) if first else (batch, depth, block, block, height, width)
    )
    order = (0, 3, 4, 1, 5, 2) if first else (0, 1, 4, 2, 5, 3)
    x = c.build.permute(c.reshape(x, split), dims=order)
    return c.reshape(x, (batch, depth, height * block, width * block))


@converts("SpaceToDepth")
def _space_to_depth(c: Call) -> fx.Node:
    x, block = c.node(0), c.attribute("blocksize")
    batch, channels, height, width = size(x)
    x = c.reshape(x, (batch, channels, height // block, block, width // block, block))
    x = c.build.permute(x, dims=(0, 3, 5, 1, 2, 4))
    return c.reshape(x, (batch, channels * block * block, height // block, width // block))


@converts("CumSum", since=11)
def _cumsum(c: Call) -> fx.Node:
    """From the front, or from the end (``reverse``); without the element itself where ``exclusive``."""
    x = c.node(0)
    axis = c.axis(c.number(1), len(size(x)))
    total = c.cast(c.build.cumsum(x, dim=axis), value(x).dtype)
    if c.attribute("reverse", 0):
        # what is left of the whole after the elements before this one
        whole = c.cast(c.build.sum(x, dims=(axis,), keepdim=True), value(x).dtype)
        total = c.build.sub(whole, total)
        return total if c.attribute("exclusive", 0) else c.build.add(total, x)
    return c.build.sub(total, x) if c.attribute("exclusive", 0) else total
