"""Pooling, padding and transposed convolutions of both front doors, in operations of the dialect.

Spatial tuples hold one entry per spatial dimension, of which there are one or two.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import fx

from tersor.errors import CaptureError
from tersor.frontends import resampling
from tersor.ir import Builder, Dim
from tersor.ir.dims import Shape, product

Sizes = tuple[int, ...]


def size(x: fx.Node) -> Shape:
    return x.meta["value"].shape


def ceiling(
    shape: Shape, kernel: Sizes, stride: Sizes, before: Sizes, after: Sizes, dilation: Sizes
) -> Sizes:
    """How far windows reach past the padded end, when the last one is only partly inside (``ceil_mode``)."""
    beyond = []
    for n, k, s, low, high, d in zip(shape, kernel, stride, before, after, dilation, strict=True):
        if isinstance(n, Dim):
            raise CaptureError(f"windows that reach past the end of the size {n}", fix="make it static")
        reach = d * (k - 1) + 1
        count = -(-(n + low + high - reach) // s) + 1
        if (count - 1) * s >= n + low:  # a window that starts in the padding after the end does not count
            count -= 1
        beyond.append(max((count - 1) * s + reach - (n + low + high), 0))
    return tuple(beyond)


def max_pool(
    build: Builder, x: fx.Node, kernel: Sizes, stride: Sizes, before: Sizes, after: Sizes, dilation: Sizes
) -> fx.Node:
    """The largest element of each window of x [B, C, *sizes]; padding before and after never wins."""
    x, flat = _image(build, x)
    kernel, stride, dilation = (_pair(t, 1) for t in (kernel, stride, dilation))
    before, after = _pair(before, 0), _pair(after, 0)
    inside = all(2 * p <= d * (k - 1) + 1 for p, k, d in zip(before, kernel, dilation, strict=True))
    if before != after or not inside:
        x, before = _padded(build, x, before, after, float("-inf")), (0, 0)
    x = build.max_pool2d(x, kernel=kernel, stride=stride, padding=before, dilation=dilation)
    return _flattened(build, x) if flat else x


def avg_pool(
    build: Builder,
    x: fx.Node,
    kernel: Sizes,
    stride: Sizes,
    before: Sizes,
    after: Sizes,
    beyond: Sizes,
    count_padding: bool,
) -> fx.Node:
    """The mean of each window; ``beyond`` more elements after the padding are 0 and never count."""
    x, flat = _image(build, x)
    kernel, stride = _pair(kernel, 1), _pair(stride, 1)
    before, after, beyond = (_pair(t, 0) for t in (before, after, beyond))
    inside = all(2 * p <= k for p, k in zip(before, kernel, strict=True))
    if before == after and beyond == (0, 0) and inside:
        x = build.avg_pool2d(x, kernel=kernel, stride=stride, padding=before, count_padding=count_padding)
        return _flattened(build, x) if flat else x
    shape = size(x)[2:]
    ends = tuple(a + b for a, b in zip(after, beyond, strict=True))
    x = build.avg_pool2d(_padded(build, x, before, ends, 0.0), kernel=kernel, stride=stride)
    if not count_padding or beyond != (0, 0):
        share = [
            _counted(n, k, s, low, high, more, count_padding)
            for n, k, s, low, high, more in zip(shape, kernel, stride, before, after, beyond, strict=True)
        ]
        x = build.mul(x, build.parameter("share", torch.outer(*share)))
    return _flattened(build, x) if flat else x


def _counted(
    n: int | Dim, k: int, s: int, low: int, high: int, more: int, count_padding: bool
) -> torch.Tensor:
    """By what each window's mean over k elements is multiplied, if not all of them count."""
    if isinstance(n, Dim):
        raise CaptureError(f"means over windows at the end of the size {n}", fix="make it static")
    one = 1.0 if count_padding else 0.0
    weights = torch.cat((torch.full((low,), one), torch.ones(n), torch.full((high,), one), torch.zeros(more)))
    return k / weights.unfold(0, k, s).sum(-1)


def adaptive_avg_pool(build: Builder, x: fx.Node, bins: Sizes) -> fx.Node:
    """Means over so many ranges of each spatial axis."""
    rank = len(size(x))
    axes = range(rank - len(bins), rank)
    if all(b == 1 for b in bins):
        return build.mean(x, dims=tuple(axes), keepdim=True)
    for axis, out in zip(axes, bins, strict=True):
        x = resampling.resample(build, x, axis, resampling.bins(_static(x, axis), out))
    return x


def adaptive_max_pool(build: Builder, x: fx.Node, bins: Sizes) -> fx.Node:
    """The largest element of so many ranges of each spatial axis."""
    rank = len(size(x))
    axes = range(rank - len(bins), rank)
    if all(b == 1 for b in bins):
        return build.amax(x, dims=tuple(axes), keepdim=True)
    for axis, out in zip(axes, bins, strict=True):
        ranges = resampling.bins(_static(x, axis), out).positions
        x = build.amax(resampling.select(build, x, axis, ranges), dims=(axis + 1,))
    return x


def pad(build: Builder, x: fx.Node, widths: Sequence[tuple[int, int]], mode: str, value: float) -> fx.Node:
    """(before, after) elements around each axis: "constant", or numpy's "reflect", "edge" and "wrap".

    Negative widths cut off.
    """
    for axis, pair in enumerate(widths):
        low, high = (min(w, 0) for w in pair)
        if low or high:
            x = build.slice(x, dim=axis, start=-low, end=size(x)[axis] + high)
    widths = [(max(a, 0), max(b, 0)) for a, b in widths]
    if mode == "constant":
        order = tuple(w for pair in reversed(widths) for w in pair)
        return build.pad(x, pads=order, value=value) if any(order) else x
    for axis, pair in enumerate(widths):
        if pair != (0, 0):
            positions = np.pad(np.arange(_static(x, axis)), pair, mode)
            x = resampling.select(build, x, axis, positions)
    return x


def transposed_convolution(
    build: Builder,
    x: fx.Node,
    weight: fx.Node,
    bias: fx.Node | None,
    stride: Sizes,
    before: Sizes,
    after: Sizes,
    dilation: Sizes,
    groups: int,
) -> fx.Node:
    """The gradient of a convolution: x [B, C, *sizes], weight [C, N/groups, *kernel] -> [B, N, *sizes'].

    ``before`` and ``after`` are cut off the ends of the full result; a negative width adds to it.
    """
    channels, each, *kernel = size(weight)
    if tuple(kernel) == stride and not any((*before, *after)) and set(dilation) == {1} and groups == 1:
        return _upscaled(build, x, weight, bias, kernel)
    rank = len(kernel)
    weight = build.reshape(weight, shape=(groups, channels // groups, each, *kernel))
    weight = build.permute(weight, dims=(0, 2, 1, *range(3, 3 + rank)))
    weight = build.reshape(weight, shape=(groups * each, channels // groups, *kernel))
    for axis, k in enumerate(kernel):
        weight = resampling.select(build, weight, 2 + axis, np.arange(k)[::-1].copy())
        x = _spread(build, x, 2 + axis, stride[axis])
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    widths = [(r - a, r - b) for r, a, b in zip(reach, before, after, strict=True)]
    x = pad(build, x, [(0, 0), (0, 0), *widths], "constant", 0.0)
    if rank == 1:
        return build.conv1d(x, weight, bias, dilation=dilation[0], groups=groups)
    return build.conv2d(x, weight, bias, dilation=dilation, groups=groups)


def _upscaled(
    build: Builder, x: fx.Node, weight: fx.Node, bias: fx.Node | None, kernel: Sequence[int]
) -> fx.Node:
    """Windows that do not overlap: every pixel becomes a block by itself."""
    (batch, channels, *sizes), n, rank = size(x), size(weight)[1], len(kernel)
    rows = build.permute(build.reshape(weight, shape=(channels, n * product(kernel))), dims=(1, 0))
    rows = build.reshape(rows, shape=(n * product(kernel), channels, *(1,) * rank))
    x = build.conv1d(x, rows) if rank == 1 else build.conv2d(x, rows)
    x = build.reshape(x, shape=(batch, n, *kernel, *sizes))
    order = [d for axis in range(rank) for d in (2 + rank + axis, 2 + axis)]
    x = build.permute(x, dims=(0, 1, *order))
    x = build.reshape(x, shape=(batch, n, *(s * k for s, k in zip(sizes, kernel, strict=True))))
    return x if bias is None else build.add(x, build.reshape(bias, shape=(n, *(1,) * rank)))


def _spread(build: Builder, x: fx.Node, axis: int, stride: int) -> fx.Node:
    """stride - 1 zeros between neighbours along an axis."""
    if stride == 1:
        return x
    shape = size(x)
    x = build.reshape(x, shape=(*shape[: axis + 1], 1, *shape[axis + 1 :]))
    x = build.pad(x, pads=(*(0, 0) * (len(shape) - axis - 1), 0, stride - 1))
    x = build.reshape(x, shape=(*shape[:axis], shape[axis] * stride, *shape[axis + 1 :]))
    return build.slice(x, dim=axis, start=0, end=shape[axis] * stride - (stride - 1))


def _image(build: Builder, x: fx.Node) -> tuple[fx.Node, bool]:
    """x with two spatial axes, and whether it had one."""
    if len(size(x)) == 3:
        batch, channels, length = size(x)
        return build.reshape(x, shape=(batch, channels, 1, length)), True
    return x, False


def _flattened(build: Builder, x: fx.Node) -> fx.Node:
    batch, channels, _, length = size(x)
    return build.reshape(x, shape=(batch, channels, length))


def _pair(values: Sizes, filler: int) -> tuple[int, int]:
    values = tuple(values)
    return values if len(values) == 2 else (filler, *values)


def _padded(build: Builder, x: fx.Node, before: Sizes, after: Sizes, value: float) -> fx.Node:
    return pad(build, x, [(0, 0), (0, 0), *zip(before, after, strict=True)], "constant", value)


def _static(x: fx.Node, axis: int) -> int:
    length = size(x)[axis]
    if isinstance(length, Dim):
        raise CaptureError(f"resampling of the dynamic size {length}", fix="make the dimension static")
    return length
