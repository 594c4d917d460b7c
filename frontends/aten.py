"""What each ATen operator becomes in the dialect.

One function per operator (or family), entered in `CONVERTERS` by `converts`. It is called with a `Context`, then the
operator's own arguments: nodes of the program, numbers, `Dim`s, tuples, None. It returns a node, or a tuple of nodes
for an operator with several results. Operators that only move data keep to reshape, permute, expand and slice; what
they form together (split heads, fused projections, masks) is for canonicalisation to recognise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from tersor.errors import CaptureError
from tersor.ir import Builder, Dim, Value, is_state
from tersor.ir.canonicalize.indices import slice_inside
from tersor.ir.dims import product
from tersor.ir.value import DTYPE_NAMES

aten = torch.ops.aten
Operand = Any  # node | number | Dim
CONVERTERS: dict[Any, Callable[..., Any]] = {}


@dataclass(frozen=True)
class Context:
    """Where a converter emits, and the value that torch says the operator has (a tuple for several results)."""

    build: Builder
    value: Value | tuple[Value | None, ...]

    @property
    def shape(self) -> tuple[int | Dim, ...]:
        return self.value.shape

    @property
    def dtype(self) -> str:
        return self.value.dtype

    def operand(self, x: Operand) -> Any:
        """A symbolic dimension used as a number becomes a scalar tensor."""
        return self.build.full(shape=(), value=x, dtype="int64") if isinstance(x, Dim) else x

    def cast(self, x: Any, dtype: str) -> Any:
        return (
            x
            if not isinstance(x, fx.Node) or x.meta["value"].dtype == dtype
            else self.build.cast(x, dtype=dtype)
        )

    def reshape(self, x: fx.Node, shape: Sequence[int | Dim]) -> fx.Node:
        return x if size(x) == tuple(shape) else self.build.reshape(x, shape=tuple(shape))

    def permute(self, x: fx.Node, dims: Sequence[int]) -> fx.Node:
        return self.build.permute(x, dims=tuple(dims))

    def slice(self, x: fx.Node, dim: int, start: int | Dim, end: int | Dim, step: int = 1) -> fx.Node:
        return slice_inside(self.build, x, dim, start, end, step, "the model reads what is not there")


def converts(*targets: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Enters a converter for these ATen overloads; those that this version of torch lacks are given as None."""

    def enter(function: Callable[..., Any]) -> Callable[..., Any]:
        for target in targets:
            if target is not None:
                CONVERTERS[target] = function
        return function

    return enter


def size(x: fx.Node) -> tuple[int | Dim, ...]:
    return x.meta["value"].shape


def _axis(x: fx.Node, dim: int) -> int:
    return dim % max(len(size(x)), 1)


def _dims(x: fx.Node, dims: int | Sequence[int] | None) -> tuple[int, ...]:
    """Reduction dimensions; none given means all."""
    rank = len(size(x))
    if dims is None or (isinstance(dims, list | tuple) and not dims):
        return tuple(range(rank))
    return tuple(d % rank for d in ([dims] if isinstance(dims, int) else dims))


def _named(dtype: torch.dtype | None, default: str) -> str:
    return default if dtype is None else DTYPE_NAMES[dtype]


# ---------------------------------------------------------------------------------------------------------------------
# Element by element


def _unary(name: str) -> Callable[..., Any]:
    return lambda c, x: c.build.emit(name, x)


def _binary(name: str) -> Callable[..., Any]:
    return lambda c, x, y: c.build.emit(name, c.operand(x), c.operand(y))


for _name in ("neg", "abs", "sqrt", "rsqrt", "reciprocal", "exp", "log", "floor", "round", "cos", "sin", "tanh", "erf",
              "sigmoid", "silu", "relu", "logical_not"):  # fmt: skip
    CONVERTERS[getattr(aten, _name).default] = _unary(_name)
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    for _overload in ("Tensor", "Scalar"):
        CONVERTERS[getattr(getattr(aten, _name), _overload)] = _binary(_name)
for _name in ("maximum", "minimum", "logical_and", "logical_or"):
    CONVERTERS[getattr(aten, _name).default] = _binary(_name)
for _target in (aten.mul.Tensor, aten.mul.Scalar):
    CONVERTERS[_target] = _binary("mul")
for _target in (aten.div.Tensor, aten.div.Scalar, aten.true_divide.Tensor):
    CONVERTERS[_target] = _binary("div")
for _target in (aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor, aten.pow.Scalar):
    CONVERTERS[_target] = _binary("pow")


@converts(aten.add.Tensor, aten.add.Scalar)
def _add(c: Context, x: Operand, y: Operand, alpha: Any = 1) -> fx.Node:
    return c.build.add(c.operand(x), _scaled(c, y, alpha))


@converts(aten.sub.Tensor, aten.sub.Scalar)
def _sub(c: Context, x: Operand, y: Operand, alpha: Any = 1) -> fx.Node:
    return c.build.sub(c.operand(x), _scaled(c, y, alpha))


@converts(aten.rsub.Tensor, aten.rsub.Scalar)
def _rsub(c: Context, x: Operand, y: Operand, alpha: Any = 1) -> fx.Node:
    return c.build.sub(c.operand(y), _scaled(c, x, alpha))


def _scaled(c: Context, x: Operand, alpha: Any) -> Any:
    x = c.operand(x)
    return x if alpha == 1 else x * alpha if not isinstance(x, fx.Node) else c.build.mul(x, alpha)


@converts(aten.square.default)
def _square(c: Context, x: fx.Node) -> fx.Node:
    return c.build.mul(x, x)


@converts(aten.ceil.default)
def _ceil(c: Context, x: fx.Node) -> fx.Node:
    return c.build.neg(c.build.floor(c.build.neg(x)))


def truncated(build: Builder, x: fx.Node) -> fx.Node:
    """The whole number next to x on the way to 0."""
    up = build.neg(build.floor(build.neg(x)))
    return build.where(build.lt(x, 0), up, build.floor(x))


@converts(aten.trunc.default, aten.fix.default)
def _trunc(c: Context, x: fx.Node) -> fx.Node:
    return truncated(c.build, x)


@converts(aten.frac.default)
def _frac(c: Context, x: fx.Node) -> fx.Node:
    return c.build.sub(x, truncated(c.build, x))


@converts(aten.fmod.Scalar, aten.fmod.Tensor)
def _fmod(c: Context, x: fx.Node, y: Operand) -> fx.Node:
    whole = c.cast(_div_mode(c, x, y, rounding_mode="trunc"), c.dtype)
    return c.build.sub(x, c.build.mul(whole, c.operand(y)))


@converts(aten.isnan.default)
def _is_nan(c: Context, x: fx.Node) -> fx.Node:
    return c.build.ne(x, x)


@converts(aten.logical_xor.default, aten.bitwise_xor.Tensor)
def _xor(c: Context, x: fx.Node, y: fx.Node) -> fx.Node:
    return _logical(c, "ne", x, y)


@converts(aten.log2.default)
def _log2(c: Context, x: fx.Node) -> fx.Node:
    return c.build.mul(c.build.log(x), 1 / math.log(2))


@converts(aten.log10.default)
def _log10(c: Context, x: fx.Node) -> fx.Node:
    return c.build.mul(c.build.log(x), 1 / math.log(10))


@converts(aten.exp2.default)
def _exp2(c: Context, x: fx.Node) -> fx.Node:
    return c.build.exp(c.build.mul(x, math.log(2)))


@converts(aten.erfc.default)
def _erfc(c: Context, x: fx.Node) -> fx.Node:
    """Exact to an absolute error of one rounding of erf."""
    return c.build.sub(1, c.build.erf(x))


@converts(aten.tan.default)
def _tan(c: Context, x: fx.Node) -> fx.Node:
    return c.build.div(c.build.sin(x), c.build.cos(x))


@converts(aten.sinh.default)
def _sinh(c: Context, x: fx.Node) -> fx.Node:
    return c.build.mul(c.build.sub(c.build.exp(x), c.build.exp(c.build.neg(x))), 0.5)


@converts(aten.cosh.default)
def _cosh(c: Context, x: fx.Node) -> fx.Node:
    return c.build.mul(c.build.add(c.build.exp(x), c.build.exp(c.build.neg(x))), 0.5)


@converts(aten.log1p.default)
def _log1p(c: Context, x: fx.Node) -> fx.Node:
    """Exact to an absolute error of one rounding of 1 + x."""
    return c.build.log(c.build.add(x, 1))


@converts(aten.expm1.default)
def _expm1(c: Context, x: fx.Node) -> fx.Node:
    """Exact to an absolute error of one rounding of exp(x)."""
    return c.build.sub(c.build.exp(x), 1)


@converts(aten.sign.default)
def _sign(c: Context, x: fx.Node) -> fx.Node:
    return c.build.sub(c.cast(c.build.gt(x, 0), c.dtype), c.cast(c.build.lt(x, 0), c.dtype))


@converts(aten.floor_divide.default)
def _floor_divide(c: Context, x: Operand, y: Operand) -> fx.Node:
    return _div_mode(c, x, y, rounding_mode="floor")


@converts(aten.div.Tensor_mode, aten.div.Scalar_mode)
def _div_mode(c: Context, x: Operand, y: Operand, *, rounding_mode: str | None) -> fx.Node:
    x, y = c.operand(x), c.operand(y)
    if rounding_mode is None:
        return c.build.div(x, y)
    if c.value.is_float:
        quotient = c.build.div(x, y)
    else:  # float64 holds every quotient of integers below 2^53
        quotient = c.build.div(c.cast(x, "float64"), c.cast(y, "float64"))
    whole = truncated(c.build, quotient) if rounding_mode == "trunc" else c.build.floor(quotient)
    return c.cast(whole, c.dtype)


@converts(aten.remainder.Scalar, aten.remainder.Tensor)
def _remainder(c: Context, x: Operand, y: Operand) -> fx.Node:
    whole = c.cast(_div_mode(c, x, y, rounding_mode="floor"), c.dtype)
    return c.build.sub(c.operand(x), c.build.mul(whole, c.operand(y)))


@converts(aten.clamp.default, aten.clamp.Tensor, aten.clamp_min.default, aten.clamp_min.Tensor)
def _clamp(c: Context, x: fx.Node, min: Operand = None, max: Operand = None) -> fx.Node:
    x = x if min is None else c.build.maximum(x, c.operand(min))
    return x if max is None else c.build.minimum(x, c.operand(max))


@converts(aten.clamp_max.default, aten.clamp_max.Tensor)
def _clamp_max(c: Context, x: fx.Node, max: Operand) -> fx.Node:
    return c.build.minimum(x, c.operand(max))


@converts(aten.gelu.default)
def _gelu(c: Context, x: fx.Node, *, approximate: str = "none") -> fx.Node:
    return c.build.gelu_tanh(x) if approximate == "tanh" else c.build.gelu(x)


@converts(aten.bitwise_and.Tensor, aten.__and__.Tensor, aten.bitwise_and.Scalar)
def _and(c: Context, x: Operand, y: Operand) -> fx.Node:
    return _logical(c, "logical_and", x, y)


@converts(aten.bitwise_or.Tensor, aten.__or__.Tensor, aten.bitwise_or.Scalar)
def _or(c: Context, x: Operand, y: Operand) -> fx.Node:
    return _logical(c, "logical_or", x, y)


@converts(aten.bitwise_not.default)
def _not(c: Context, x: fx.Node) -> fx.Node:
    return _logical(c, "logical_not", x)


def _logical(c: Context, name: str, *operands: Operand) -> fx.Node:
    if c.dtype != "bool":
        raise CaptureError(
            f"the model does bit arithmetic on {c.dtype}", why="the dialect has it on booleans only"
        )
    return c.build.emit(name, *operands)


@converts(aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar)
def _where(c: Context, condition: fx.Node, x: Operand, y: Operand) -> fx.Node:
    return c.build.where(condition, c.operand(x), c.operand(y))


@converts(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def _masked_fill(c: Context, x: fx.Node, mask: fx.Node, value: Operand) -> fx.Node:
    return c.build.where(mask, c.operand(value), x)


@converts(aten._to_copy.default, aten.to.dtype, aten.to.dtype_layout, aten.to.device)
def _to(c: Context, x: fx.Node, *_: Any, **__: Any) -> fx.Node:
    return c.cast(x, c.dtype)


@converts(aten.type_as.default)
def _type_as(c: Context, x: fx.Node, other: fx.Node) -> fx.Node:
    return c.cast(x, c.dtype)


@converts(
    aten.clone.default, aten.alias.default, aten.contiguous.default, aten.detach.default,
    aten.lift_fresh_copy.default, aten.positive.default,
)  # fmt: skip
def _same(c: Context, x: fx.Node, *_: Any, **__: Any) -> fx.Node:
    return x


@converts(aten.dropout.default, aten.native_dropout.default)
def _dropout(c: Context, x: fx.Node, p: float, train: bool | None) -> Any:
    """Nothing in evaluation mode; a model that asks for dropout regardless cannot be one fixed program."""
    if train and p > 0:
        raise CaptureError(
            "the model drops values at random in evaluation mode too", fix="pass training=self.training"
        )
    return (x, None) if isinstance(c.value, tuple) else x


# ---------------------------------------------------------------------------------------------------------------------
# Shape


@converts(
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints, aten.squeeze.default,
    aten.unflatten.int, aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default, aten.view_as.default,
    aten._reshape_copy.default,
)  # fmt: skip
def _reshape(c: Context, x: fx.Node, *_: Any, **__: Any) -> fx.Node:
    return c.reshape(x, c.shape)


@converts(aten.expand.default, aten.expand_as.default, aten.broadcast_to.default)
def _expand(c: Context, x: fx.Node, *_: Any, **__: Any) -> fx.Node:
    return c.build.expand(x, shape=c.shape)


@converts(aten.permute.default)
def _permute(c: Context, x: fx.Node, dims: Sequence[int]) -> fx.Node:
    return c.permute(x, [_axis(x, d) for d in dims])


@converts(aten.transpose.int, aten.swapaxes.default)
def _transpose(c: Context, x: fx.Node, first: int, second: int) -> fx.Node:
    dims = list(range(len(size(x))))
    first, second = _axis(x, first), _axis(x, second)
    dims[first], dims[second] = second, first
    return c.permute(x, dims)


@converts(aten.t.default, aten.numpy_T.default, aten.mT.default)
def _t(c: Context, x: fx.Node) -> fx.Node:
    return _transpose(c, x, -2, -1) if len(size(x)) > 1 else x


@converts(aten.movedim.int)
def _movedim(c: Context, x: fx.Node, source: int, destination: int) -> fx.Node:
    dims = list(range(len(size(x))))
    dims.insert(_axis(x, destination), dims.pop(_axis(x, source)))
    return c.permute(x, dims)


@converts(aten.slice.Tensor)
def _slice(
    c: Context, x: fx.Node, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> fx.Node:
    dim = _axis(x, dim)
    start = _position(start, size(x)[dim], default=0)
    if step != 1:
        return c.slice(x, dim, start, _position(end, size(x)[dim], default=size(x)[dim]), step)
    # torch has clamped the end already: the length is the result's
    return c.slice(x, dim, start, start + c.shape[dim]) if c.shape[dim] != size(x)[dim] else x


@converts(aten.narrow.default)
def _narrow(c: Context, x: fx.Node, dim: int, start: Any, length: Any) -> fx.Node:
    start = _position(start, size(x)[_axis(x, dim)], default=0)
    return c.slice(x, _axis(x, dim), start, start + length)


def _position(index: Any, total: int | Dim, default: int | Dim) -> int | Dim:
    if index is None:
        return default
    if isinstance(index, int) and index < 0:
        index = index + total
        return max(index, 0) if isinstance(index, int) else index
    return min(index, total) if isinstance(index, int) and isinstance(total, int) else index


@converts(aten.select.int)
def _select(c: Context, x: fx.Node, dim: int, index: int | Dim) -> fx.Node:
    dim = _axis(x, dim)
    if isinstance(index, int) and index < 0:
        index = index + size(x)[dim]
    return c.reshape(c.slice(x, dim, index, index + 1), c.shape)


@converts(
    aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.split.sizes, aten.tensor_split.sections,
    aten.tensor_split.indices,
)  # fmt: skip
def _split(c: Context, x: fx.Node, _: Any, dim: int = 0) -> tuple[fx.Node, ...]:
    dim, start, parts = _axis(x, dim), 0, []
    for part in c.value:
        end = start + part.shape[dim]
        parts.append(c.slice(x, dim, start, end))
        start = end
    return tuple(parts)


@converts(aten.unbind.int)
def _unbind(c: Context, x: fx.Node, dim: int = 0) -> tuple[fx.Node, ...]:
    dim = _axis(x, dim)
    return tuple(c.reshape(c.slice(x, dim, i, i + 1), part.shape) for i, part in enumerate(c.value))


@converts(aten.cat.default)
def _cat(c: Context, tensors: Sequence[fx.Node], dim: int = 0) -> fx.Node:
    kept = [t for t in tensors if size(t) != (0,)]  # torch skips these
    if len(kept) == 1:
        return c.cast(kept[0], c.dtype)
    return c.build.concat(tuple(c.cast(t, c.dtype) for t in kept), dim=_axis(kept[0], dim))


@converts(aten.stack.default)
def _stack(c: Context, tensors: Sequence[fx.Node], dim: int = 0) -> fx.Node:
    dim = dim % len(c.shape)
    one = (*c.shape[:dim], 1, *c.shape[dim + 1 :])
    return c.build.concat(tuple(c.reshape(c.cast(t, c.dtype), one) for t in tensors), dim=dim)


@converts(aten.repeat.default)
def _repeat(c: Context, x: fx.Node, repeats: Sequence[int | Dim]) -> fx.Node:
    sizes = (1,) * (len(repeats) - len(size(x))) + size(x)
    split = [d for s in sizes for d in (1, s)]
    wide = [d for r, s in zip(repeats, sizes, strict=True) for d in (r, s)]
    return c.reshape(c.build.expand(c.reshape(x, split), shape=tuple(wide)), c.shape)


@converts(aten.repeat_interleave.self_int)
def _repeat_interleave(c: Context, x: fx.Node, repeats: int, dim: int | None = None, **_: Any) -> fx.Node:
    x = x if dim is not None else c.reshape(x, (product(size(x)),))
    dim = _axis(x, dim or 0)
    lead, tail = size(x)[: dim + 1], size(x)[dim + 1 :]
    return c.reshape(c.build.expand(c.reshape(x, (*lead, 1, *tail)), shape=(*lead, repeats, *tail)), c.shape)


@converts(aten.flip.default)
def _flip(c: Context, x: fx.Node, dims: Sequence[int]) -> fx.Node:
    for dim in (_axis(x, d) for d in dims):
        total = size(x)[dim]
        backwards = c.build.sub(c.operand(total - 1), c.build.arange(end=total))
        x = c.build.index_select(x, backwards, dim=dim)
    return x


@converts(aten.copy.default)
def _copy(c: Context, x: fx.Node, source: fx.Node, *_: Any) -> fx.Node:
    return c.build.expand(c.cast(source, c.dtype), shape=c.shape)


@converts(aten.slice_scatter.default)
def _slice_scatter(
    c: Context, x: fx.Node, source: fx.Node, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> fx.Node:
    """x with a range replaced: what an assignment to a slice becomes."""
    dim = _axis(x, dim)
    start = _position(start, size(x)[dim], default=0)
    if step == 1:
        return _replaced(c, x, source, dim, start)
    place = c.build.mul(c.build.arange(end=size(source)[dim]), step)
    place = c.reshape(_shifted(c, place, start), (size(source)[dim], *(1,) * (len(size(x)) - 1 - dim)))
    return c.build.scatter(x, c.build.expand(place, shape=size(source)), source, dim=dim)


@converts(aten.select_scatter.default)
def _select_scatter(c: Context, x: fx.Node, source: fx.Node, dim: int, index: int | Dim) -> fx.Node:
    dim = _axis(x, dim)
    shape = (*size(x)[:dim], 1, *size(x)[dim + 1 :])
    return _replaced(c, x, c.reshape(source, shape), dim, _position(index, size(x)[dim], default=0))


def _replaced(c: Context, x: fx.Node, source: fx.Node, dim: int, start: int | Dim) -> fx.Node:
    if isinstance(start, int) and is_state(_written(x)):
        at = c.build.full(shape=(), value=start, dtype="int64")
        return c.build.cache_update(x, c.cast(source, c.dtype), at, dim=dim)
    end = start + size(source)[dim]
    parts = [c.slice(x, dim, 0, start), source, c.slice(x, dim, end, size(x)[dim])]
    kept = tuple(p for p in parts if size(p)[dim] != 0)
    return kept[0] if len(kept) == 1 else c.build.concat(kept, dim=dim)


def _written(x: fx.Node) -> fx.Node:
    """What a value was before anything was written into it."""
    while x.op == "call_function" and x.target.name == "cache_update":
        x = x.args[0]
    return x


@converts(aten.roll.default)
def _roll(c: Context, x: fx.Node, shifts: Any, dims: Any = ()) -> fx.Node:
    shifts = [shifts] if isinstance(shifts, int | Dim) else shifts
    dims = [dims] if isinstance(dims, int) else dims
    flat = not dims
    shape, x = size(x), c.reshape(x, (product(size(x)),)) if flat else x
    for shift, dim in zip(shifts, dims or [0], strict=True):
        dim, total = _axis(x, dim), size(x)[_axis(x, dim)]
        cut = (total - shift) % total if isinstance(total, int) else total - shift if shift > 0 else -shift
        if cut != 0:
            x = c.build.concat((c.slice(x, dim, cut, total), c.slice(x, dim, 0, cut)), dim=dim)
    return c.reshape(x, shape)


# ---------------------------------------------------------------------------------------------------------------------
# Indexing


@converts(aten.embedding.default)
def _embedding(c: Context, table: fx.Node, ids: fx.Node, *_: Any, **__: Any) -> fx.Node:
    return c.build.embedding(c.cast(ids, "int64"), table)


@converts(aten.index_select.default)
def _index_select(c: Context, x: fx.Node, dim: int, index: fx.Node) -> fx.Node:
    return c.reshape(c.build.index_select(x, c.cast(index, "int64"), dim=_axis(x, dim)), c.shape)


@converts(aten.gather.default)
def _gather(c: Context, x: fx.Node, dim: int, index: fx.Node, **_: Any) -> fx.Node:
    return c.build.gather(x, c.cast(index, "int64"), dim=_axis(x, dim))


@converts(aten.index.Tensor)
def _index(c: Context, x: fx.Node, indices: Sequence[fx.Node | None]) -> fx.Node:
    """Several index tensors together are one index into the flattened dimensions."""
    axes = [i for i, index in enumerate(indices) if index is not None]
    if any(indices[i].meta["value"].dtype == "bool" for i in axes):
        raise CaptureError("the model indexes with a boolean mask", why="the result's shape depends on values",
                           fix="use torch.where, or multiply by the mask")  # fmt: skip
    if axes != list(range(axes[0], axes[-1] + 1)):  # numpy puts the result of separated indices first
        rest = [i for i in range(len(size(x))) if i not in axes]
        x, indices = c.permute(x, [*axes, *rest]), [indices[i] for i in axes]
        axes = list(range(len(axes)))
    first, last = axes[0], axes[-1] + 1
    shape = (*size(x)[:first], product(size(x)[first:last]), *size(x)[last:])
    return c.build.index_select(c.reshape(x, shape), flat_index(c, x, indices, axes), dim=first)


def flat_index(c: Context, x: fx.Node, indices: Sequence[fx.Node | None], axes: Sequence[int]) -> fx.Node:
    """Index tensors of neighbouring axes as one int64 index into those axes seen as one; negative ones count back."""
    flat: Any = None
    for axis in axes:
        total = size(x)[axis]
        index = c.cast(indices[axis], "int64")
        index = c.build.where(c.build.lt(index, 0), c.build.add(index, c.operand(total)), index)
        flat = index if flat is None else c.build.add(c.build.mul(flat, c.operand(total)), index)
    return flat


@converts(aten.triu.default)
def _triu(c: Context, x: fx.Node, diagonal: int = 0) -> fx.Node:
    rows, columns = _grid(c, x)
    return c.build.where(c.build.ge(columns, _shifted(c, rows, diagonal)), x, _zero(c.value))


@converts(aten.tril.default)
def _tril(c: Context, x: fx.Node, diagonal: int = 0) -> fx.Node:
    rows, columns = _grid(c, x)
    return c.build.where(c.build.le(columns, _shifted(c, rows, diagonal)), x, _zero(c.value))


def _grid(c: Context, x: fx.Node) -> tuple[fx.Node, fx.Node]:
    rows, columns = size(x)[-2:]
    return c.build.reshape(c.build.arange(end=rows), shape=(rows, 1)), c.build.arange(end=columns)


def _shifted(c: Context, x: fx.Node, by: int | Dim) -> fx.Node:
    return x if by == 0 else c.build.add(x, c.operand(by))


def _zero(value: Value) -> bool | int | float:
    return False if value.dtype == "bool" else 0.0 if value.is_float else 0


# ---------------------------------------------------------------------------------------------------------------------
# New tensors


@converts(aten.arange.default)
def _arange(c: Context, end: Any, **kwargs: Any) -> fx.Node:
    return _arange_start_step(c, 0, end, 1, **kwargs)


@converts(aten.arange.start, aten.arange.start_step)
def _arange_start_step(c: Context, start: Any, end: Any, step: Any = 1, **_: Any) -> fx.Node:
    positions = c.build.arange(end=c.shape[0], dtype="int64" if isinstance(step, int) else c.dtype)
    positions = positions if step == 1 else c.build.mul(positions, step)
    return c.cast(_shifted(c, positions, start), c.dtype)


@converts(aten.full.default)
def _full(c: Context, shape: Any, value: Any, **_: Any) -> fx.Node:
    return c.build.full(shape=c.shape, value=value, dtype=c.dtype)


@converts(aten.full_like.default, aten.new_full.default)
def _full_like(c: Context, *args: Any, **_: Any) -> fx.Node:
    return c.build.full(shape=c.shape, value=args[-1], dtype=c.dtype)


@converts(aten.scalar_tensor.default)
def _scalar_tensor(c: Context, value: Any, **_: Any) -> fx.Node:
    return c.build.full(shape=(), value=value, dtype=c.dtype)


@converts(aten.ones.default, aten.ones_like.default, aten.new_ones.default)
def _ones(c: Context, *_: Any, **__: Any) -> fx.Node:
    return c.build.full(shape=c.shape, value=True if c.dtype == "bool" else 1, dtype=c.dtype)


@converts(aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default)
def _zeros(c: Context, *_: Any, **__: Any) -> fx.Node:
    return c.build.full(shape=c.shape, value=_zero(c.value), dtype=c.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Reductions


@converts(aten.mean.dim, aten.mean.default)
def _mean(c: Context, x: fx.Node, dims: Any = None, keepdim: bool = False, **_: Any) -> fx.Node:
    return c.build.mean(c.cast(x, c.dtype), dims=_dims(x, dims), keepdim=keepdim)


@converts(aten.sum.dim_IntList, aten.sum.default)
def _sum(c: Context, x: fx.Node, dims: Any = None, keepdim: bool = False, **_: Any) -> fx.Node:
    return c.build.sum(c.cast(x, c.dtype), dims=_dims(x, dims), keepdim=keepdim)


@converts(aten.amax.default, aten.max.default, aten.any.dim, aten.any.default, aten.any.dims)
def _amax(c: Context, x: fx.Node, dims: Any = None, keepdim: bool = False) -> fx.Node:
    return c.build.amax(c.cast(x, c.dtype), dims=_dims(x, dims), keepdim=keepdim)


@converts(aten.amin.default, aten.min.default, aten.all.dim, aten.all.default, aten.all.dims)
def _amin(c: Context, x: fx.Node, dims: Any = None, keepdim: bool = False) -> fx.Node:
    return c.build.amin(c.cast(x, c.dtype), dims=_dims(x, dims), keepdim=keepdim)


@converts(aten.max.dim)
def _max_dim(c: Context, x: fx.Node, dim: int, keepdim: bool = False) -> tuple[fx.Node, fx.Node]:
    dim = _axis(x, dim)
    return c.build.amax(x, dims=(dim,), keepdim=keepdim), c.build.argmax(x, dim=dim, keepdim=keepdim)


@converts(aten.argmax.default)
def _argmax(c: Context, x: fx.Node, dim: int | None = None, keepdim: bool = False) -> fx.Node:
    if dim is None:
        return c.reshape(c.build.argmax(c.reshape(x, (product(size(x)),)), dim=0), c.shape)
    return c.build.argmax(x, dim=_axis(x, dim), keepdim=keepdim)


@converts(aten.var.correction, aten.var.dim)
def _var(
    c: Context, x: fx.Node, dims: Any = None, *rest: Any, correction: Any = None, keepdim: bool = False
) -> fx.Node:
    if rest:  # var.dim(x, dims, unbiased, keepdim)
        correction, keepdim = int(rest[0]), rest[1] if len(rest) > 1 else keepdim
    correction = 1 if correction is None else correction
    axes = _dims(x, dims)
    count = product(size(x)[d] for d in axes)
    centred = c.build.sub(x, c.build.mean(x, dims=axes, keepdim=True))
    squares = c.build.mul(centred, centred)
    if correction == 0:
        return c.build.mean(squares, dims=axes, keepdim=keepdim)
    return c.build.div(c.build.sum(squares, dims=axes, keepdim=keepdim), c.operand(count - correction))


@converts(aten.var_mean.correction)
def _var_mean(c: Context, x: fx.Node, dims: Any = None, **options: Any) -> tuple[fx.Node, fx.Node]:
    one = Context(c.build, c.value[0])
    return _var(one, x, dims, **options), c.build.mean(
        x, dims=_dims(x, dims), keepdim=options.get("keepdim", False)
    )


@converts(aten.instance_norm.default)
def _instance_norm(
    c: Context, x: fx.Node, weight: Any, bias: Any, mean: Any, var: Any, use_input_stats: bool, momentum: float,
    eps: float, *_: Any,
) -> fx.Node:  # fmt: skip
    """A group norm of one channel per group, or a batch norm where it has statistics of its own."""
    if not use_input_stats:
        return batch_norm(c.build, x, weight, bias, mean, var, eps)
    return _group_norm(c, x, size(x)[1], weight, bias, eps)


@converts(aten.softmax.int, aten._softmax.default, aten._safe_softmax.default)
def _softmax(c: Context, x: fx.Node, dim: int, *_: Any, **__: Any) -> fx.Node:
    return c.build.softmax(c.cast(x, c.dtype), dim=_axis(x, dim))


@converts(aten.log_softmax.int, aten._log_softmax.default)
def _log_softmax(c: Context, x: fx.Node, dim: int, *_: Any, **__: Any) -> fx.Node:
    return c.build.log_softmax(c.cast(x, c.dtype), dim=_axis(x, dim))


@converts(aten.cumsum.default)
def _cumsum(c: Context, x: fx.Node, dim: int, **_: Any) -> fx.Node:
    return c.build.cumsum(c.cast(x, c.dtype), dim=_axis(x, dim))


# ---------------------------------------------------------------------------------------------------------------------
# Matrix products


@converts(aten.linear.default)
def _linear(c: Context, x: fx.Node, weight: fx.Node, bias: fx.Node | None = None) -> fx.Node:
    if len(size(x)) == 1:
        return c.reshape(_linear(c, c.reshape(x, (1, *size(x))), weight, bias), c.shape)
    return c.build.linear(x, weight, bias) if bias is not None else c.build.linear(x, weight)


@converts(aten.mm.default, aten.bmm.default)
def _matmul(c: Context, x: fx.Node, y: fx.Node) -> fx.Node:
    return c.build.matmul(x, y)


@converts(aten.matmul.default, aten.mv.default, aten.dot.default)
def _matmul_of_any_rank(c: Context, x: fx.Node, y: fx.Node) -> fx.Node:
    left = x if len(size(x)) > 1 else c.reshape(x, (1, *size(x)))
    right = y if len(size(y)) > 1 else c.reshape(y, (*size(y), 1))
    return c.reshape(c.build.matmul(left, right), c.shape)


@converts(aten.addmm.default, aten.baddbmm.default)
def _addmm(c: Context, bias: fx.Node, x: fx.Node, y: fx.Node, *, beta: Any = 1, alpha: Any = 1) -> fx.Node:
    result = _scaled(c, c.build.matmul(x, y), alpha)
    return result if beta == 0 else c.build.add(result, _scaled(c, bias, beta))


# ---------------------------------------------------------------------------------------------------------------------
# Normalisation, attention


@converts(aten.layer_norm.default, aten.native_layer_norm.default)
def _layer_norm(
    c: Context,
    x: fx.Node,
    shape: Sequence[int],
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    *_: Any,
) -> Any:
    lead, width = size(x)[: -len(shape)], product(shape)
    flat = c.reshape(x, (*lead, width))
    weight, bias = (p if p is None else c.reshape(p, (width,)) for p in (weight, bias))
    result = c.reshape(c.build.layer_norm(flat, weight, bias, eps=eps), size(x))
    return (result, None, None) if isinstance(c.value, tuple) else result


@converts(getattr(aten.rms_norm, "default", None))
def _rms_norm(
    c: Context, x: fx.Node, shape: Sequence[int], weight: Any = None, eps: float | None = None
) -> fx.Node:
    lead, width = size(x)[: -len(shape)], product(shape)
    weight = weight if weight is None else c.reshape(weight, (width,))
    eps = torch.finfo(x.meta["value"].torch_dtype).eps if eps is None else eps
    return c.reshape(c.build.rms_norm(c.reshape(x, (*lead, width)), weight, eps=eps), size(x))


@converts(aten.native_group_norm.default)
def _native_group_norm(
    c: Context,
    x: fx.Node,
    weight: Any,
    bias: Any,
    batch: Any,
    channels: Any,
    width: Any,
    groups: int,
    eps: float,
) -> Any:
    return _group_norm(c, x, groups, weight, bias, eps), None, None


@converts(aten.group_norm.default)
def _group_norm(
    c: Context, x: fx.Node, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any
) -> fx.Node:
    """A layer norm over each group's channels and positions; weight and bias are per channel."""
    shape = size(x)
    channel = (1, shape[1], *([1] * (len(shape) - 2)))
    grouped = c.reshape(x, (shape[0], groups, product(shape[1:]) // groups))
    result = c.reshape(c.build.layer_norm(grouped, eps=eps), shape)
    result = result if weight is None else c.build.mul(result, c.reshape(weight, channel))
    return result if bias is None else c.build.add(result, c.reshape(bias, channel))


@converts(aten._native_batch_norm_legit_no_training.default)
def _batch_norm(
    c: Context, x: fx.Node, weight: Any, bias: Any, mean: fx.Node, var: fx.Node, momentum: float, eps: float
) -> Any:
    return (_normalised(c, x, weight, bias, mean, var, eps), None, None)


@converts(aten.batch_norm.default)
def _batch_norm_whole(
    c: Context, x: fx.Node, weight: Any, bias: Any, mean: Any, var: Any, training: bool, momentum: float, eps: float,
    *_: Any,
) -> fx.Node:  # fmt: skip
    if training or mean is None:
        raise CaptureError(
            "the model has a batch norm without running statistics", fix="train it with statistics"
        )
    return _normalised(c, x, weight, bias, mean, var, eps)


def _normalised(
    c: Context, x: fx.Node, weight: Any, bias: Any, mean: fx.Node, var: fx.Node, eps: float
) -> fx.Node:
    return batch_norm(c.build, x, weight, bias, mean, var, eps)


def batch_norm(
    build: Builder, x: fx.Node, weight: Any, bias: Any, mean: fx.Node, var: fx.Node, eps: float
) -> fx.Node:
    """x [B, C, ...] * scale + shift per channel, both made from stored vectors [C], so that they fold."""
    scale = build.rsqrt(build.add(var, eps))
    scale = scale if weight is None else build.mul(scale, weight)
    shift = build.neg(build.mul(mean, scale))
    shift = shift if bias is None else build.add(shift, bias)
    channel = (size(x)[1], *(1,) * (len(size(x)) - 2))
    scale, shift = (build.reshape(v, shape=channel) for v in (scale, shift))
    return build.add(build.mul(x, scale), shift)


@converts(aten.scaled_dot_product_attention.default)
def _attention(
    c: Context, q: fx.Node, k: fx.Node, v: fx.Node, mask: fx.Node | None = None, dropout: float = 0.0,
    is_causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False,
) -> fx.Node:  # fmt: skip
    """Heads are merged before and split after; the reshapes meet those of the model and vanish."""
    q, k, v = (_four_dimensional(c, t) for t in (q, k, v))
    batch, heads, tq, width = size(q)
    tk, kv_heads = size(k)[2], size(k)[1]
    if isinstance(heads, Dim) or isinstance(kv_heads, Dim):
        raise CaptureError(f"attention over {heads} heads", why="the number of heads must be static")
    scale = 1 / math.sqrt(width) if scale is None else scale
    causal = is_causal and tq == tk
    if is_causal and not causal:  # torch aligns the triangle at the top left, the dialect at the bottom right
        rows = c.build.reshape(c.build.arange(end=tq), shape=(tq, 1))
        mask = c.reshape(c.build.le(c.build.arange(end=tk), rows), (1, 1, tq, tk))
    if mask is not None:
        mask = _mask_of_rank_four(c, mask)
    merged = [merge_heads(c.build, t) for t in (q, k, v)]
    out = c.build.attention(*merged, mask, heads=heads, kv_heads=kv_heads, scale=scale, causal=causal)
    return c.reshape(split_heads(c.build, out, heads), c.shape)


def merge_heads(build: Builder, x: fx.Node) -> fx.Node:
    """[B, H, T, D] -> [B, T, H*D]."""
    batch, heads, length, width = size(x)
    return build.reshape(build.permute(x, dims=(0, 2, 1, 3)), shape=(batch, length, heads * width))


def split_heads(build: Builder, x: fx.Node, heads: int) -> fx.Node:
    """[B, T, H*D] -> [B, H, T, D]."""
    batch, length, width = size(x)
    return build.permute(build.reshape(x, shape=(batch, length, heads, width // heads)), dims=(0, 2, 1, 3))


def _four_dimensional(c: Context, x: fx.Node) -> fx.Node:
    lead = size(x)[:-3] if len(size(x)) > 3 else ()
    return c.reshape(x, (product(lead), *((1,) * (3 - len(size(x)))), *size(x)[-3:]))


def _mask_of_rank_four(c: Context, mask: fx.Node) -> fx.Node:
    shape = size(mask)
    if len(shape) > 4:
        raise CaptureError(
            f"attention with a mask of rank {len(shape)}", why="batch, heads, queries, keys are four"
        )
    return c.reshape(mask, (1,) * (4 - len(shape)) + shape)
