"""ONNX operators that move or make data."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from tersor.frontends.onnx.codes import name_of
from tersor.frontends.onnx.reader import dtype_name
from tersor.frontends.onnx.table import Call, converts, dtype, size, value
from tersor.frontends.onnx.values import Known, Undecided, known_sizes, sign
from tersor.ir import Dim
from tersor.ir.canonicalize.affine import lower_bound
from tersor.ir.canonicalize.indices import TableTooShort
from tersor.ir.dims import Shape, product
from tersor.ir.matching import is_call
from tersor.ir.opset.quantization import CODES
from tersor.ir.opset.rules import broadcast

_FAR = 1 << 31  # ends of slices from here on mean "to the end"


@converts("Shape")
def _shape(c: Call) -> Known:
    shape = size(c.require(0))
    start, end = c.attribute("start", 0), c.attribute("end")
    return known_sizes(list(shape[start:end]))


@converts("Size")
def _size(c: Call) -> Known:
    return known_sizes(product(size(c.require(0))))


@converts("Constant")
def _constant(c: Call) -> Known:
    for name in ("value", "value_float", "value_int", "value_floats", "value_ints"):
        found = c.attribute(name)
        if isinstance(found, Known):
            return found
        if found is not None:
            return Known(torch.tensor(found, dtype=torch.int64 if "int" in name else torch.float32))
    raise c.refuse("holds strings or a sparse tensor", why="programs have none")


@converts("ConstantOfShape")
def _constant_of_shape(c: Call) -> Any:
    shape = c.sizes(0)
    fill = c.attribute("value", Known(torch.zeros(1)))
    return c.build.full(shape=shape, value=fill.tensor.item(), dtype=fill.dtype)


@converts("Range")
def _range(c: Call) -> fx.Node:
    start, limit, step = (c.number(i) for i in range(3))
    name = dtype(c.require(0))
    if not all(isinstance(x, int | Dim) for x in (start, limit, step)) or isinstance(step, Dim):
        if any(isinstance(x, Dim) for x in (start, limit, step)):
            raise c.refuse("counts in fractions up to a dynamic size", why="its length is not a polynomial")
        return c.as_node(Known(torch.arange(start, limit, step, dtype=c.constant(0).tensor.dtype)))
    count = limit - start
    if step != 1:
        if isinstance(count, Dim) and not count.divisible(step):
            raise c.refuse(f"counts to {count} in steps of {step}", why="that length is not a polynomial")
        count = count // step if isinstance(count, Dim) else max(-(-count // step), 0)
    positions = c.build.arange(end=count if isinstance(count, Dim) else max(count, 0))
    positions = positions if step == 1 else c.build.mul(positions, step)
    if isinstance(start, Dim):
        positions = c.build.add(positions, c.build.full(shape=(), value=start, dtype="int64"))
    elif start != 0:
        positions = c.build.add(positions, start)
    return c.cast(positions, name)


@converts("Reshape")
def _reshape(c: Call) -> fx.Node:
    x = c.node(0)
    wanted = list(c.sizes(1))
    if not c.attribute("allowzero", 0):
        wanted = [size(x)[i] if d == 0 and not isinstance(d, Dim) else d for i, d in enumerate(wanted)]
    if wanted.count(-1) > 1:
        raise c.refuse(f"leaves two sizes open: {wanted}")
    if -1 in wanted:
        i = wanted.index(-1)
        rest = product(d for j, d in enumerate(wanted) if j != i)
        wanted[i] = product(size(x)) // rest if rest != 0 else 0
    return c.reshape(x, wanted)


@converts("Flatten")
def _flatten(c: Call) -> fx.Node:
    x, axis = c.node(0), c.attribute("axis", 1)
    axis = axis + len(size(x)) if axis < 0 else axis
    return c.reshape(x, (product(size(x)[:axis]), product(size(x)[axis:])))


@converts("Squeeze")
def _squeeze(c: Call) -> fx.Node:
    x = c.node(0)
    axes = c.axes(1, len(size(x)))
    if axes is None:
        # Which axes go must not depend on the call.
        dims = c.build.function.dims
        unsure = [d for d in size(x) if isinstance(d, Dim) and lower_bound(d, dims) <= 1]
        if unsure:
            raise c.refuse(
                f"removes every axis of size 1 from {value(x)}",
                why=f"{', '.join(map(str, unsure))} may be 1, and then the result has fewer axes",
                fix="export the model with the axes named, or let the dimension start at 2",
            )
        axes = [i for i, d in enumerate(size(x)) if d == 1]
    if any(size(x)[a] != 1 for a in axes):
        raise c.refuse(f"removes axes {axes} of {value(x)}", why="only axes of size 1 can be removed")
    return c.reshape(x, [d for i, d in enumerate(size(x)) if i not in axes])


@converts("Unsqueeze")
def _unsqueeze(c: Call) -> fx.Node:
    x = c.node(0)
    count = len(c.ints(1) if c.given(1) else c.attribute("axes"))
    axes = c.axes(1, len(size(x)) + count)
    shape = list(size(x))
    for axis in sorted(axes):
        shape.insert(axis, 1)
    return c.reshape(x, shape)


@converts("Transpose")
def _transpose(c: Call) -> fx.Node:
    x = c.node(0)
    dims = tuple(c.attribute("perm") or reversed(range(len(size(x)))))
    return x if list(dims) == list(range(len(dims))) else c.build.permute(x, dims=dims)


@converts("Expand")
def _expand(c: Call) -> fx.Node:
    x = c.node(0)
    return c.expand(x, broadcast(size(x), c.sizes(1)))


@converts("Tile")
def _tile(c: Call) -> fx.Node:
    x, repeats = c.node(0), c.sizes(1)
    sizes = size(x)
    split = [d for s in sizes for d in (1, s)]
    wide = tuple(d for r, s in zip(repeats, sizes, strict=True) for d in (r, s))
    shape = [r * s for r, s in zip(repeats, sizes, strict=True)]
    return c.reshape(c.expand(c.reshape(x, split), wide), shape)


@converts("Concat")
def _concat(c: Call) -> fx.Node:
    parts = [c.node(i) for i in range(len(c.inputs))]
    return c.concat(parts, c.axis(c.attribute("axis"), len(size(parts[0]))))


@converts("Split")
def _split(c: Call) -> tuple[fx.Node, ...]:
    x = c.node(0)
    axis = c.axis(c.attribute("axis", 0), len(size(x)))
    sizes = c.sizes(1) if c.given(1) else c.attribute("split")
    if sizes is None:
        parts, total = c.attribute("num_outputs", c.results), size(x)[axis]
        count = min(parts, c.results)  # the others are read by nobody
        if isinstance(total, Dim):
            sizes = [total // parts] * count
        else:
            each = -(-total // parts)
            sizes = [max(min(each, total - each * i), 0) for i in range(count)]
    found, start = [], 0
    for length in sizes:
        found.append(c.slice(x, axis, start, start + length))
        start = start + length
    return tuple(found)


@converts("Slice", since=10)
def _slice(c: Call) -> fx.Node:
    x = c.node(0)
    starts, ends = c.sizes(1), c.sizes(2)
    axes = c.axes(3, len(size(x))) if c.given(3) else tuple(range(len(starts)))
    steps = c.ints(4) if c.given(4) else (1,) * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        x = _cut(c, x, axis, start, end, step)
    return x


def _cut(c: Call, x: fx.Node, axis: int, start: int | Dim, end: int | Dim, step: int) -> fx.Node:
    total = size(x)[axis]
    if step < 0:
        if (start, step) != (-1, -1) or not (isinstance(end, int) and end <= -_FAR):
            raise c.refuse(f"goes backwards from {start} to {end}", why="only whole axes can be reversed")
        last = total - 1
        first = c.build.full(shape=(), value=last, dtype="int64") if isinstance(last, Dim) else last
        back = c.build.arange(end=total)
        back = c.build.add(c.build.neg(back), first)
        return c.build.index_select(x, back, dim=axis)
    start = _position(c, start, total)
    end = _position(c, end, total)
    length = end - start
    if isinstance(length, int) and length < 0:
        end = start
    return c.slice(x, axis, start, end, step)


def _position(c: Call, index: int | Dim, total: int | Dim) -> int | Dim:
    """An index as ONNX counts it, from the end where negative and never outside, as a position in 0..total."""
    if isinstance(index, int) and abs(index) >= _FAR:
        return total if index > 0 else 0
    dims = c.build.function.dims
    try:
        if sign(index, dims) < 0:
            index = index + total
        if sign(index, dims) <= 0:
            return 0
        return index if sign(total - index, dims) >= 0 else total
    except Undecided:
        pass
    try:  # neither end, or sometimes one of them
        if sign(total - index + 1, dims) > 0:
            return index
        if sign(index - total + 1, dims) > 0:
            return total
    except Undecided:
        pass
    raise TableTooShort(
        f"{c.operator} cuts at {index} of {total}",
        spare=total - index,
        why="whether that lies inside depends on the dynamic sizes",
        fix="narrow the range of the dimension, so that it does for all sizes",
    )


@converts("Gather")
def _gather(c: Call) -> fx.Node:
    stored = c.require(0)
    axis = c.axis(c.attribute("axis", 0), len(size(stored)))
    coded = axis == 0 and isinstance(stored, Known) and bool(stored.name) and stored.dtype in CODES
    x = c.as_node(replace(stored, name=f"{name_of(stored.name)}.codes") if coded else stored)
    index = c.known(1)
    if index is not None and index.is_number:
        at = index.number()
        at = at + size(x)[axis] if isinstance(at, int) and at < 0 else at
        part = c.slice(x, axis, at, at + 1)
        return c.reshape(part, (*size(x)[:axis], *index.shape, *size(x)[axis + 1 :]))
    positions = non_negative(c, c.require(1), size(x)[axis])
    if axis == 0 and len(size(x)) == 2 and (value(x).is_float or coded):
        return c.build.embedding(positions, x)
    return c.build.index_select(x, positions, dim=axis)


def non_negative(c: Call, index: fx.Node | Known, total: int | Dim) -> fx.Node:
    """Indices as int64; those that may be negative count from the end.

    Indices that come from inputs as they are (token ids) are taken to be positions.
    """
    node = c.cast(c.as_node(index), "int64")
    if isinstance(index, Known):
        if index.tensor is not None and bool((index.tensor < 0).any()):
            if isinstance(total, Dim):
                node = c.build.where(c.build.lt(node, 0), _plus(c, node, total), node)
            else:
                node = c.as_node(
                    Known(torch.where(index.tensor < 0, index.tensor + total, index.tensor).long())
                )
        return node
    return node


def _plus(c: Call, x: fx.Node, amount: int | Dim) -> fx.Node:
    other = c.build.full(shape=(), value=amount, dtype="int64") if isinstance(amount, Dim) else amount
    return c.build.add(x, other)


@converts("GatherElements", since=11)
def _gather_elements(c: Call) -> fx.Node:
    x = c.node(0)
    axis = c.axis(c.attribute("axis", 0), len(size(x)))
    return c.build.gather(x, non_negative(c, c.require(1), size(x)[axis]), dim=axis)


@converts("GatherND", since=11)
def _gather_nd(c: Call) -> fx.Node:
    """Each row of indices as one index into the flattened leading axes."""
    x, index = c.node(0), c.require(1)
    if c.attribute("batch_dims", 0):
        raise c.refuse("gathers along batch axes", why="the dialect has no such operation")
    count = size(index)[-1]
    if isinstance(count, Dim):
        raise c.refuse("indexes a dynamic number of axes")
    lead = size(index)[:-1]
    flat = None
    for axis in range(count):
        total = size(x)[axis]
        if isinstance(index, Known) and index.tensor is not None:
            one = non_negative(c, Known(index.tensor[..., axis].contiguous()), total)
        else:
            cut = c.slice(non_negative(c, index, total), len(lead), axis, axis + 1)
            one = c.reshape(cut, lead)
        factor = c.build.full(shape=(), value=total, dtype="int64") if isinstance(total, Dim) else total
        flat = one if flat is None else c.build.add(c.build.mul(flat, factor), one)
    rows = c.reshape(x, (product(size(x)[:count]), *size(x)[count:]))
    return c.build.index_select(rows, flat, dim=0)


@converts("OneHot", since=9)
def _one_hot(c: Call) -> fx.Node:
    depth, values = c.number(1), c.constant(2).tensor
    index = non_negative(c, c.require(0), depth)
    axis = c.axis(c.attribute("axis", -1), len(size(index)) + 1)
    one = (*size(index)[:axis], 1, *size(index)[axis:])
    classes = c.build.reshape(c.build.arange(end=depth), shape=(depth, *(1,) * (len(one) - 1 - axis)))
    hit = c.build.eq(c.reshape(index, one), classes)
    off, on = (Known(v.reshape(())) for v in values)
    return c.cast(c.build.where(hit, on.number(), off.number()), off.dtype)


@converts("Trilu", since=14)
def _trilu(c: Call) -> fx.Node:
    x = c.node(0)
    rows, columns = size(x)[-2:]
    row = c.build.reshape(c.build.arange(end=rows), shape=(rows, 1))
    k = c.number(1, 0)
    row = row if k == 0 else _plus(c, row, k)
    column = c.build.arange(end=columns)
    kept = c.build.ge(column, row) if c.attribute("upper", 1) else c.build.le(column, row)
    zero: Any = False if value(x).dtype == "bool" else 0.0 if value(x).is_float else 0
    return c.build.where(kept, x, zero)


@converts("NonZero", since=9)
def _non_zero(c: Call) -> fx.Node:
    """Of a vector of ones all positions, which is how old exporters count."""
    x = c.require(0)
    if is_call(x, "full") and len(size(x)) == 1 and x.kwargs["value"] != 0:
        length = size(x)[0]
        return c.build.reshape(c.build.arange(end=length), shape=(1, length))
    if isinstance(x, Known) and x.tensor is not None:
        return c.as_node(Known(torch.nonzero(x.tensor).t().contiguous()))
    raise c.refuse(
        "finds positions by the values of tensors",
        why="its result's shape depends on values",
        fix="use Where, or multiply by a mask",
    )


@converts("EyeLike", since=9)
def _eye_like(c: Call) -> fx.Node:
    rows, columns = size(c.require(0))
    row = c.build.reshape(_plus(c, c.build.arange(end=rows), c.attribute("k", 0)), shape=(rows, 1))
    code = c.attribute("dtype")
    name = dtype(c.require(0)) if code is None else dtype_name(code)
    return c.cast(c.build.eq(c.build.arange(end=columns), row), name)


def spread(c: Call, x: fx.Node, shape: Shape) -> fx.Node:
    """x with axes of size 1 in front, up to the rank of ``shape``."""
    return c.reshape(x, (1,) * (len(shape) - len(size(x))) + size(x))
