"""Operations that move or make data without arithmetic on it."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from tersor.errors import ProgramError
from tersor.ir.dialect import Op, ops
from tersor.ir.dims import Dim, Shape, product
from tersor.ir.opset.rules import axis, broadcast, require_dtype, show
from tersor.ir.value import DTYPES, Value


def reshape(x, *, shape: Shape):
    """The same elements in order, in another shape."""
    return x.reshape(shape)


def _infer_reshape(x: Value, *, shape: Shape) -> Value:
    if product(x.shape) != product(shape) or _negative(shape):
        raise ProgramError(f"cannot reshape {show(x.shape)} to {show(shape)}")
    return Value(x.dtype, tuple(shape))


def _negative(shape: Shape) -> bool:
    return any(isinstance(size, int) and size < 0 for size in shape)


def permute(x, *, dims: tuple[int, ...]):
    """Dimension i of the result is dimension ``dims[i]`` of x."""
    return x.permute(dims)


def _infer_permute(x: Value, *, dims: tuple[int, ...]) -> Value:
    if sorted(dims) != list(range(x.rank)):
        raise ProgramError(f"{dims} is not a permutation of the dimensions of {show(x.shape)}")
    return Value(x.dtype, tuple(x.shape[d] for d in dims))


def expand(x, *, shape: Shape):
    """x broadcast to ``shape``."""
    return x.expand(shape)


def _infer_expand(x: Value, *, shape: Shape) -> Value:
    if broadcast(x.shape, shape) != tuple(shape):
        raise ProgramError(f"cannot expand {show(x.shape)} to {show(shape)}")
    return Value(x.dtype, tuple(shape))


def slice(x, *, dim: int, start: int | Dim = 0, end: int | Dim | None = None, step: int = 1):
    """Elements start, start+step, ... before ``end`` along ``dim``; 0 <= start <= end <= size, step >= 1."""
    return torch.ops.aten.slice.Tensor(x, dim, start, x.shape[dim] if end is None else end, step)


def _infer_slice(
    x: Value, *, dim: int, start: int | Dim = 0, end: int | Dim | None = None, step: int = 1
) -> Value:
    dim = axis(dim, x.rank)
    stop = x.shape[dim] if end is None else end
    length = stop - start
    if step != 1:
        if isinstance(length, Dim):
            raise ProgramError(f"a slice with step {step} needs a static length, got {length}")
        length = -(-length // step)
    if _negative((start, length)) or _negative((x.shape[dim] - stop,)) or step < 1:
        raise ProgramError(f"slice [{start}:{stop}:{step}] is not inside dimension {dim} of {show(x.shape)}")
    return Value(x.dtype, (*x.shape[:dim], length, *x.shape[dim + 1 :]))


def concat(tensors, *, dim: int):
    """The tensors one after the other along ``dim``."""
    return torch.cat(list(tensors), dim)


def _infer_concat(tensors: tuple[Value, ...], *, dim: int) -> Value:
    first = tensors[0]
    dim = axis(dim, first.rank)
    total: int | Dim = 0
    for t in tensors:
        if (
            t.rank != first.rank
            or t.dtype != first.dtype
            or any(a != b for i, (a, b) in enumerate(zip(t.shape, first.shape, strict=True)) if i != dim)
        ):
            raise ProgramError(f"cannot concatenate {t} and {first} along dimension {dim}")
        total = total + t.shape[dim]
    return Value(first.dtype, (*first.shape[:dim], total, *first.shape[dim + 1 :]))


def pad(x, *, pads: tuple[int, ...], value: float = 0.0):
    """Constant padding; ``pads`` is (before, after) per dimension, from the last one backwards (torch's order)."""
    return F.pad(x, pads, value=value)


def _infer_pad(x: Value, *, pads: tuple[int, ...], value: float = 0.0) -> Value:
    shape = list(x.shape)
    for i in range(len(pads) // 2):
        shape[-1 - i] = shape[-1 - i] + pads[2 * i] + pads[2 * i + 1]
    if len(pads) % 2 or len(pads) > 2 * x.rank or _negative(tuple(shape)):
        raise ProgramError(f"cannot pad {show(x.shape)} by {pads}")
    return Value(x.dtype, tuple(shape))


def index_select(x, index, *, dim: int):
    """Slices of x along ``dim`` at the int64 positions ``index``, whose shape replaces the dimension."""
    dim = dim % x.ndim
    taken = torch.index_select(x, dim, index.reshape(-1))
    return taken.reshape((*x.shape[:dim], *index.shape, *x.shape[dim + 1 :]))


def _infer_index_select(x: Value, index: Value, *, dim: int) -> Value:
    dim = axis(dim, x.rank)
    require_dtype("int64", index=index)
    return Value(x.dtype, (*x.shape[:dim], *index.shape, *x.shape[dim + 1 :]))


def gather(x, index, *, dim: int):
    """out[i][j] = x[i][index[i][j]] along ``dim`` (torch.gather)."""
    return torch.gather(x, dim, index)


def _infer_gather(x: Value, index: Value, *, dim: int) -> Value:
    dim = axis(dim, x.rank)
    require_dtype("int64", index=index)
    if index.rank != x.rank or any(
        isinstance(a - b, int) and a - b > 0
        for i, (a, b) in enumerate(zip(index.shape, x.shape, strict=True))
        if i != dim
    ):
        raise ProgramError(f"cannot gather {index} from {x} along dimension {dim}")
    return Value(x.dtype, index.shape)


def cache_update(state, value, position, *, dim: int):
    """state with value's slices along ``dim`` at int64 ``position``: of the first one, or [T], one for each.

    A position outside the state is an error: in torch, and in lowered code before it writes anything. Equal positions
    leave one of their slices. Where the result is the next value of the state itself, lowered code writes in place.
    """
    dim = dim % state.ndim
    if position.ndim == 0:
        position = position + torch.arange(value.shape[dim])
    return state.index_copy(dim, position, value)


def _infer_cache_update(state: Value, value: Value, position: Value, *, dim: int) -> Value:
    dim = axis(dim, state.rank)
    require_dtype("int64", position=position)
    length = value.shape[dim] if value.rank == state.rank else None
    if (value.dtype, (*value.shape[:dim], *value.shape[dim + 1 :])) != (
        state.dtype,
        (*state.shape[:dim], *state.shape[dim + 1 :]),
    ) or length is None:
        raise ProgramError(f"cannot write {value} into {state} along dimension {dim}")
    if position.shape not in ((), (length,)):
        raise ProgramError(f"positions {position} for {length} slices", fix="give one for each, or the first")
    room = state.shape[dim]
    if isinstance(length - room, int) and length - room > 0:
        raise ProgramError(f"{length} slices do not fit into {state}, which has room for {room}")
    return state


def scatter(x, index, source, *, dim: int, reduce: str = "none"):
    """x with x[i][index[i][j]] set to source[i][j] along ``dim``, or ``reduce``: add, mul, amax, amin.

    ``index`` (int64) and ``source`` have one shape. Where positions repeat, the last one counts if nothing reduces.
    """
    if reduce == "none":
        return torch.scatter(x, dim, index, source)
    name = {"add": "sum", "mul": "prod"}.get(reduce, reduce)
    return torch.scatter_reduce(x, dim, index, source, name)


def _infer_scatter(x: Value, index: Value, source: Value, *, dim: int, reduce: str = "none") -> Value:
    dim = axis(dim, x.rank)
    require_dtype("int64", index=index)
    require_dtype(x.dtype, source=source)
    if reduce not in ("none", "add", "mul", "amax", "amin"):
        raise ProgramError(f"scatter: unknown reduction {reduce!r}")
    if (
        index.shape != source.shape
        or index.rank != x.rank
        or any(
            isinstance(a - b, int) and a - b > 0
            for i, (a, b) in enumerate(zip(index.shape, x.shape, strict=True))
            if i != dim
        )
    ):
        raise ProgramError(f"scatter: cannot put {source} at {index} of {x} along dimension {dim}")
    return x


def arange(*, end: int | Dim, dtype: str = "int64"):
    """0, 1, ..., end - 1."""
    return torch.arange(end, dtype=DTYPES[dtype])


def full(*, shape: Shape, value: float | int | bool, dtype: str):
    """A tensor with one value everywhere."""
    return torch.full(shape, value, dtype=DTYPES[dtype])


def cumsum(x, *, dim: int):
    """Running sum along ``dim``; integers and booleans give int64."""
    return torch.cumsum(x, dim)


def _infer_cumsum(x: Value, *, dim: int) -> Value:
    axis(dim, x.rank)
    return Value(x.dtype if x.is_float else "int64", x.shape)


def _infer_arange(*, end: int | Dim, dtype: str = "int64") -> Value:
    return _infer_full(shape=(end,), value=0, dtype=dtype)


def _infer_full(*, shape: Shape, value: float | int | bool, dtype: str) -> Value:
    if _negative(shape) or dtype not in DTYPES:
        raise ProgramError(f"there is no tensor {dtype}{show(shape)}")
    return Value(dtype, tuple(shape))


def _moved(result: Value, *operands: Any, **_: Any) -> int | Dim:
    """Bytes of an operation that reads, of its first operand, just the elements it writes."""
    return 2 * result.bytes + sum(x.bytes for x in operands[1:])


def _op(function: Any, infer: Any, bytes: Any = None) -> None:
    ops.register(Op(function.__name__, function, infer, bytes=bytes))


_op(reshape, _infer_reshape, lambda result, x, *, shape: 0)
_op(permute, _infer_permute)
_op(expand, _infer_expand)
_op(slice, _infer_slice, _moved)
_op(concat, _infer_concat)
_op(pad, _infer_pad)
_op(index_select, _infer_index_select, _moved)
_op(gather, _infer_gather, _moved)
_op(
    cache_update,
    _infer_cache_update,
    lambda result, state, value, position, *, dim: 2 * value.bytes + position.bytes,
)
_op(scatter, _infer_scatter)
_op(arange, _infer_arange)
_op(full, _infer_full)
_op(cumsum, _infer_cumsum)
