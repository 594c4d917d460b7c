"""Operations that combine elements along dimensions."""

from __future__ import annotations

from typing import Any

import torch

from tersor.errors import ProgramError
from tersor.ir.dialect import Op, ops
from tersor.ir.opset.rules import axis, require_float, same_float
from tersor.ir.value import Value

Dims = tuple[int, ...]


def _reduced(x: Value, dtype: str, dims: Dims, keepdim: bool) -> Value:
    gone = {axis(d, x.rank) for d in dims}
    if not dims or len(gone) != len(dims):
        raise ProgramError(
            f"cannot reduce {x} over the dimensions {dims}", why="they are none, or one is there twice"
        )
    if keepdim:
        return Value(dtype, tuple(1 if i in gone else d for i, d in enumerate(x.shape)))
    return Value(dtype, tuple(d for i, d in enumerate(x.shape) if i not in gone))


def sum(x, *, dims: Dims, keepdim: bool = False):
    """Sum over ``dims``; integers and booleans give int64."""
    return torch.sum(x, dims, keepdim)


def mean(x, *, dims: Dims, keepdim: bool = False):
    """Arithmetic mean over ``dims``."""
    return torch.mean(x, dims, keepdim)


def amax(x, *, dims: Dims, keepdim: bool = False):
    """The largest element over ``dims``."""
    return torch.amax(x, dims, keepdim)


def amin(x, *, dims: Dims, keepdim: bool = False):
    """The smallest element over ``dims``."""
    return torch.amin(x, dims, keepdim)


def argmax(x, *, dim: int, keepdim: bool = False):
    """int64 position of the largest element along ``dim`` (the first one of equals)."""
    return torch.argmax(x, dim, keepdim)


def argsort(x, *, dim: int, descending: bool = False):
    """int64 positions of the elements along ``dim`` in order; equals keep theirs, NaN counts as the largest."""
    return torch.argsort(x, dim=dim, descending=descending, stable=True)


def softmax(x, *, dim: int):
    """exp(x - max) / sum of the same, along ``dim``."""
    return torch.softmax(x, dim)


def log_softmax(x, *, dim: int):
    """log(softmax(x)) along ``dim``."""
    return torch.log_softmax(x, dim)


def _infer_sum(x: Value, *, dims: Dims, keepdim: bool = False) -> Value:
    return _reduced(x, x.dtype if x.is_float else "int64", dims, keepdim)


def _infer_same_dtype(x: Value, *, dims: Dims, keepdim: bool = False) -> Value:
    return _reduced(x, x.dtype, dims, keepdim)


def _infer_mean(x: Value, *, dims: Dims, keepdim: bool = False) -> Value:
    require_float("the mean of", x)
    return _reduced(x, x.dtype, dims, keepdim)


def _infer_argsort(x: Value, *, dim: int, descending: bool = False) -> Value:
    axis(dim, x.rank)
    return Value("int64", x.shape)


def _infer_softmax(x: Value, *, dim: int) -> Value:
    axis(dim, x.rank)
    return same_float(x)


def _op(function: Any, infer: Any) -> None:
    ops.register(Op(function.__name__, function, infer))


_op(sum, _infer_sum)
_op(mean, _infer_mean)
_op(amax, _infer_same_dtype)
_op(amin, _infer_same_dtype)
_op(argmax, lambda x, *, dim, keepdim=False: _reduced(x, "int64", (dim,), keepdim))
_op(argsort, _infer_argsort)
_op(softmax, _infer_softmax)
_op(log_softmax, _infer_softmax)
