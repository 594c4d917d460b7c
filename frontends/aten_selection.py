"""ATen operators that order elements, or write some of them: sort, topk, scatter, assignment by index."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from tersor.errors import CaptureError
from tersor.frontends.aten import Context, Operand, aten, converts, flat_index, size
from tersor.ir import Dim
from tersor.ir.dims import product

# -- order


@converts(aten.sort.default, aten.sort.stable)
def _sort(
    c: Context, x: fx.Node, dim: int = -1, descending: bool = False, *, stable: bool | None = None
) -> tuple[fx.Node, fx.Node]:
    order = c.build.argsort(x, dim=_axis(x, dim), descending=descending)
    return c.build.gather(x, order, dim=_axis(x, dim)), order


@converts(aten.argsort.default, aten.argsort.stable)
def _argsort(c: Context, x: fx.Node, dim: int = -1, descending: bool = False, **_: Any) -> fx.Node:
    return c.build.argsort(x, dim=_axis(x, dim), descending=descending)


@converts(aten.topk.default)
def _topk(
    c: Context, x: fx.Node, k: int, dim: int = -1, largest: bool = True, sorted: bool = True
) -> tuple[fx.Node, fx.Node]:
    dim = _axis(x, dim)
    if isinstance(k, Dim):
        raise CaptureError(f"the model takes the {k} largest values", why="their number must be static")
    order = c.build.argsort(x, dim=dim, descending=largest)
    order = c.slice(order, dim, 0, k)
    return c.build.gather(x, order, dim=dim), order


@converts(aten.argmin.default)
def _argmin(c: Context, x: fx.Node, dim: int | None = None, keepdim: bool = False) -> fx.Node:
    x = c.build.neg(x)
    if dim is None:
        return c.reshape(c.build.argmax(c.reshape(x, (product(size(x)),)), dim=0), c.shape)
    return c.build.argmax(x, dim=_axis(x, dim), keepdim=keepdim)


@converts(aten.min.dim)
def _min_dim(c: Context, x: fx.Node, dim: int, keepdim: bool = False) -> tuple[fx.Node, fx.Node]:
    dim = _axis(x, dim)
    place = c.build.argmax(c.build.neg(x), dim=dim, keepdim=keepdim)
    return c.build.amin(x, dims=(dim,), keepdim=keepdim), place


# -- writing


@converts(aten.scatter.src)
def _scatter(c: Context, x: fx.Node, dim: int, index: fx.Node, source: fx.Node) -> fx.Node:
    return _scattered(c, x, dim, index, source, "none")


@converts(aten.scatter.value)
def _scatter_value(c: Context, x: fx.Node, dim: int, index: fx.Node, value: Operand) -> fx.Node:
    source = c.build.full(shape=size(index), value=value, dtype=x.meta["value"].dtype)
    return _scattered(c, x, dim, index, source, "none")


@converts(aten.scatter_add.default)
def _scatter_add(c: Context, x: fx.Node, dim: int, index: fx.Node, source: fx.Node) -> fx.Node:
    return _scattered(c, x, dim, index, source, "add")


@converts(aten.scatter_reduce.two)
def _scatter_reduce(
    c: Context,
    x: fx.Node,
    dim: int,
    index: fx.Node,
    source: fx.Node,
    reduce: str,
    *,
    include_self: bool = True,
) -> fx.Node:
    names = {"sum": "add", "prod": "mul", "amax": "amax", "amin": "amin"}
    if reduce not in names or not include_self:
        raise CaptureError(
            f"the model scatters with the reduction {reduce!r}"
            + ("" if include_self else ", without itself"),
            why=f"the dialect scatters with {', '.join(names)}, the old value among them",
        )
    return _scattered(c, x, dim, index, source, names[reduce])


def _scattered(c: Context, x: fx.Node, dim: int, index: fx.Node, source: fx.Node, reduce: str) -> fx.Node:
    for axis, (part, whole) in enumerate(zip(size(index), size(source), strict=True)):
        if part != whole:  # torch reads the first elements of a larger source
            source = c.slice(source, axis, 0, part)
    return c.build.scatter(x, c.cast(index, "int64"), source, dim=_axis(x, dim), reduce=reduce)


@converts(aten.index_copy.default)
def _index_copy(c: Context, x: fx.Node, dim: int, index: fx.Node, source: fx.Node) -> fx.Node:
    dim = _axis(x, dim)
    shape = (*size(x)[:dim], product(size(index)), *size(x)[dim + 1 :])
    positions = c.reshape(c.cast(index, "int64"), (shape[dim],))
    return c.build.cache_update(x, c.reshape(source, shape), positions, dim=dim)


@converts(aten.index_put.default)
def _index_put(
    c: Context, x: fx.Node, indices: Sequence[fx.Node | None], values: fx.Node, accumulate: bool = False
) -> fx.Node:
    """Index tensors as one into the flattened dimensions, whose slices are then written."""
    axes = [i for i, index in enumerate(indices) if index is not None]
    if len(axes) == 1 and indices[axes[0]].meta["value"].dtype == "bool":
        return _put_where(c, x, axes[0], indices[axes[0]], values, accumulate)
    if axes != list(range(axes[0], axes[-1] + 1)) or any(
        indices[i].meta["value"].dtype == "bool" for i in axes
    ):
        raise CaptureError(
            "the model assigns to separated index tensors, or to several boolean ones",
            why="the dialect writes slices of neighbouring dimensions",
            fix="permute the indexed dimensions together before the assignment",
        )
    shape, first, last = size(x), axes[0], axes[-1] + 1
    lead, tail = shape[:first], shape[last:]
    flat = flat_index(c, x, indices, axes)
    count = product(size(flat))
    rows = c.reshape(x, (*lead, product(shape[first:last]), *tail))
    region = (*lead, *size(flat), *tail)
    ranked = c.reshape(c.cast(values, c.dtype), (*(1,) * (len(region) - len(size(values))), *size(values)))
    written = c.reshape(c.build.expand(ranked, shape=region), (*lead, count, *tail))
    if not accumulate:
        return c.reshape(c.build.cache_update(rows, written, c.reshape(flat, (count,)), dim=first), shape)
    place = c.reshape(flat, (*(1,) * len(lead), count, *(1,) * len(tail)))
    place = c.build.expand(place, shape=(*lead, count, *tail))
    return c.reshape(c.build.scatter(rows, place, written, dim=first, reduce="add"), shape)


def _put_where(
    c: Context, x: fx.Node, axis: int, mask: fx.Node, values: fx.Node, accumulate: bool
) -> fx.Node:
    """x[mask] = one value."""
    if product(size(values)) != 1:
        raise CaptureError(
            "the model assigns several values to a boolean mask",
            why="which value goes where depends on values",
            fix="use torch.where",
        )
    rest = len(size(x)) - axis - len(size(mask))
    mask = c.reshape(mask, (*size(mask), *(1,) * rest))
    value = c.reshape(values, ())
    return c.build.where(mask, c.build.add(x, value) if accumulate else value, x)


def _axis(x: fx.Node, dim: int) -> int:
    return dim % max(len(size(x)), 1)
