"""Operations over neighbourhoods: pooling windows, and axes resampled by a table."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from tersor.errors import ProgramError
from tersor.ir.dialect import Op, ops
from tersor.ir.dims import Dim
from tersor.ir.opset.rules import axis, require_dtype, require_float, window_positions
from tersor.ir.value import Value

Pair = tuple[int, int]


def max_pool2d(x, *, kernel: Pair, stride: Pair, padding: Pair = (0, 0), dilation: Pair = (1, 1)):
    """The largest element of each window: x [B, C, H, W] -> [B, C, H', W']; padding never wins."""
    return F.max_pool2d(x, kernel, stride, padding, dilation)


def avg_pool2d(x, *, kernel: Pair, stride: Pair, padding: Pair = (0, 0), count_padding: bool = True):
    """The mean of each window: x [B, C, H, W] -> [B, C, H', W']; padding is 0 and counts, or is left out."""
    return F.avg_pool2d(x, kernel, stride, padding, count_include_pad=count_padding)


def _infer_pool(x: Value, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair) -> Value:
    require_float("pooling", x)
    if x.rank != 4 or min(*kernel, *stride, *dilation) < 1 or min(padding) < 0:
        raise ProgramError(f"pooling of {x} with windows {kernel}, stride {stride}, padding {padding}")
    if any(p * 2 > d * (k - 1) + 1 for p, k, d in zip(padding, kernel, dilation, strict=True)):
        raise ProgramError(
            f"pooling with padding {padding} of windows {kernel}", why="a window may lie in the padding alone"
        )
    sizes = [
        window_positions(x.shape[2 + i], kernel[i], stride[i], padding[i], dilation[i]) for i in range(2)
    ]
    return Value(x.dtype, (*x.shape[:2], *sizes))


def _infer_max_pool2d(
    x: Value, *, kernel: Pair, stride: Pair, padding: Pair = (0, 0), dilation: Pair = (1, 1)
) -> Value:
    return _infer_pool(x, kernel, stride, padding, dilation)


def _infer_avg_pool2d(
    x: Value, *, kernel: Pair, stride: Pair, padding: Pair = (0, 0), count_padding: bool = True
) -> Value:
    return _infer_pool(x, kernel, stride, padding, (1, 1))


def resample(x, positions, weights, *, dim: int):
    """out[o] = sum over t of weights[o, t] * x[positions[o, t]] along ``dim``: interpolation, uneven means.

    ``positions`` is int64 [out, taps], ``weights`` has the type of x and the same shape.
    """
    dim = dim % x.ndim
    taken = torch.index_select(x, dim, positions.reshape(-1)).unflatten(dim, positions.shape)
    return (taken * weights.reshape(*positions.shape, *(1,) * (x.ndim - dim - 1))).sum(dim + 1)


def _infer_resample(x: Value, positions: Value, weights: Value, *, dim: int) -> Value:
    dim = axis(dim, x.rank)
    require_float("resampling", x)
    require_dtype("int64", positions=positions)
    require_dtype(x.dtype, weights=weights)
    if positions.rank != 2 or weights.shape != positions.shape or isinstance(positions.shape[1], Dim):
        raise ProgramError(f"resample: positions {positions} and weights {weights} do not fit")
    return Value(x.dtype, (*x.shape[:dim], positions.shape[0], *x.shape[dim + 1 :]))


ops.register(Op("max_pool2d", max_pool2d, _infer_max_pool2d))
ops.register(Op("avg_pool2d", avg_pool2d, _infer_avg_pool2d))
ops.register(
    Op(
        "resample",
        resample,
        _infer_resample,
        macs=lambda result, x, positions, weights, *, dim: result.elements * positions.shape[1],
    )
)
