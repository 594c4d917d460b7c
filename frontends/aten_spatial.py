"""ATen operators over neighbourhoods: pooling, interpolation, padding, transposed convolutions, sliding windows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import fx

from tersor.errors import CaptureError
from tersor.frontends import resampling, spatial
from tersor.frontends.aten import Context, aten, converts, size
from tersor.ir import Dim

Parameter = Any  # one number for all spatial dimensions, or a list of them


def each(parameter: Parameter, rank: int) -> tuple[int, ...]:
    values = tuple(parameter) if isinstance(parameter, list | tuple) else (parameter,)
    return values * rank if len(values) == 1 else values


def _batched(c: Context, x: fx.Node, rank: int) -> fx.Node:
    """[B, C, *sizes], of an image without a batch as well."""
    return c.reshape(x, (1, *size(x))) if len(size(x)) == rank + 1 else x


# -- pooling


@converts(aten.max_pool1d.default)
def _max_pool1d(c: Context, x: fx.Node, *args: Any, **kwargs: Any) -> fx.Node:
    return _max_pool(c, 1, x, *args, **kwargs)


@converts(aten.max_pool2d.default)
def _max_pool2d(c: Context, x: fx.Node, *args: Any, **kwargs: Any) -> fx.Node:
    return _max_pool(c, 2, x, *args, **kwargs)


@converts(aten.max_pool2d_with_indices.default)
def _max_pool2d_with_indices(c: Context, x: fx.Node, *args: Any, **kwargs: Any) -> Any:
    return _max_pool(c, 2, x, *args, **kwargs), None


def _max_pool(
    c: Context, rank: int, x: fx.Node, kernel: Parameter, stride: Parameter = (), padding: Parameter = 0,
    dilation: Parameter = 1, ceil_mode: bool = False,
) -> fx.Node:  # fmt: skip
    kernel, padding, dilation = (each(p, rank) for p in (kernel, padding, dilation))
    stride, x = each(stride, rank) if stride else kernel, _batched(c, x, rank)
    after = padding
    if ceil_mode:
        beyond = spatial.ceiling(size(x)[2:], kernel, stride, padding, padding, dilation)
        after = tuple(p + b for p, b in zip(padding, beyond, strict=True))
    value = c.value[0] if isinstance(c.value, tuple) else c.value
    return c.reshape(spatial.max_pool(c.build, x, kernel, stride, padding, after, dilation), value.shape)


@converts(aten.avg_pool1d.default)
def _avg_pool1d(c: Context, x: fx.Node, *args: Any, **kwargs: Any) -> fx.Node:
    return _avg_pool(c, 1, x, *args, **kwargs)


@converts(aten.avg_pool2d.default)
def _avg_pool2d(c: Context, x: fx.Node, *args: Any, **kwargs: Any) -> fx.Node:
    return _avg_pool(c, 2, x, *args, **kwargs)


def _avg_pool(
    c: Context, rank: int, x: fx.Node, kernel: Parameter, stride: Parameter = (), padding: Parameter = 0,
    ceil_mode: bool = False, count_include_pad: bool = True, divisor_override: int | None = None,
) -> fx.Node:  # fmt: skip
    kernel, padding = each(kernel, rank), each(padding, rank)
    stride, x = each(stride, rank) if stride else kernel, _batched(c, x, rank)
    beyond = (0,) * rank
    if ceil_mode:
        beyond = spatial.ceiling(size(x)[2:], kernel, stride, padding, padding, (1,) * rank)
    if divisor_override is not None:
        after = tuple(p + b for p, b in zip(padding, beyond, strict=True))
        means = spatial.avg_pool(c.build, x, kernel, stride, padding, after, (0,) * rank, True)
        result = c.build.mul(means, float(np.prod(kernel)) / divisor_override)
    else:
        result = spatial.avg_pool(
            c.build, x, kernel, stride, padding, padding, beyond, count_include_pad or not any(padding)
        )
    return c.reshape(result, c.shape)


@converts(
    aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default, aten._adaptive_avg_pool2d.default
)
def _adaptive_avg_pool(c: Context, x: fx.Node, sizes: Parameter) -> fx.Node:
    return spatial.adaptive_avg_pool(c.build, x, _bins(c, x, sizes))


@converts(aten.adaptive_max_pool1d.default, aten.adaptive_max_pool2d.default)
def _adaptive_max_pool(c: Context, x: fx.Node, sizes: Parameter) -> Any:
    return spatial.adaptive_max_pool(c.build, x, _bins(c, x, sizes)), None


def _bins(c: Context, x: fx.Node, sizes: Parameter) -> tuple[int, ...]:
    value = c.value[0] if isinstance(c.value, tuple) else c.value
    return tuple(value.shape[len(value.shape) - len(each(sizes, 1)) :])


# -- interpolation


def _interpolates(target: Any, taps: Callable[..., Callable[..., Any]], flags: int) -> None:
    """Enters both overloads of an operator: ``(x, sizes, flags..., scales)``, scales as a list or one by one.

    ``taps(*flags)(size, out, scale)`` gives the table of one axis.
    """

    def whole(c: Context, x: fx.Node, sizes: Any, *rest: Any) -> fx.Node:
        factors = rest[flags] if len(rest) > flags else None
        return _interpolated(c, x, factors, taps(*rest[:flags]))

    def one_by_one(c: Context, x: fx.Node, sizes: Any, *rest: Any, **named: Any) -> fx.Node:
        return _interpolated(c, x, (*rest[flags:], *named.values()), taps(*rest[:flags]))

    converts(target.vec)(whole)
    converts(target.default)(one_by_one)


def _interpolated(c: Context, x: fx.Node, scales: Sequence[float | None] | None, taps: Any) -> fx.Node:
    """One spatial axis after the other."""
    sizes = c.shape[2:]
    for axis, (out, scale) in enumerate(zip(sizes, scales or [None] * len(sizes), strict=True), start=2):
        total = size(x)[axis]
        if isinstance(total, Dim) or isinstance(out, Dim):
            raise CaptureError(
                f"the model resizes {total} to {out}",
                why="what is interpolated is decided at capture",
                fix="make the sizes of images static",
            )
        found = taps(total, out, scale)
        make = resampling.select if isinstance(found, np.ndarray) else resampling.resample
        x = make(c.build, x, axis, found)
    return x


def _nearest(rule: str, rounding: str) -> Callable[..., Any]:
    def taps(total: int, out: int, scale: float | None) -> np.ndarray:
        return resampling.nearest(resampling.coordinates(total, out, rule, scale), total, rounding)

    return lambda: taps


def _weighted(table: Callable[..., resampling.Taps]) -> Callable[..., Any]:
    def aligned(align_corners: bool) -> Callable[..., resampling.Taps]:
        rule = "align_corners" if align_corners else "half_pixel"
        return lambda total, out, scale: table(resampling.coordinates(total, out, rule, scale), total)

    return aligned


def _smoothed(order: int) -> Callable[..., Any]:
    def aligned(align_corners: bool) -> Callable[..., resampling.Taps]:
        if align_corners:
            raise CaptureError("the model resizes with antialiasing and aligned corners")
        return lambda total, out, scale: resampling.smoothed(total, out, scale, order)

    return aligned


for _target in (aten.upsample_nearest1d, aten.upsample_nearest2d):
    _interpolates(_target, _nearest("asymmetric", "floor"), flags=0)
for _target in (aten._upsample_nearest_exact1d, aten._upsample_nearest_exact2d):
    _interpolates(_target, _nearest("half_pixel", "round_prefer_ceil"), flags=0)
for _target in (aten.upsample_linear1d, aten.upsample_bilinear2d):
    _interpolates(_target, _weighted(resampling.linear), flags=1)
_interpolates(aten.upsample_bicubic2d, _weighted(resampling.cubic), flags=1)
_interpolates(aten._upsample_bilinear2d_aa, _smoothed(1), flags=1)
_interpolates(aten._upsample_bicubic2d_aa, _smoothed(3), flags=1)


# -- padding, windows, transposed convolutions

_MODES = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}


@converts(aten.pad.default)
def _pad(
    c: Context, x: fx.Node, pads: Sequence[int], mode: str = "constant", value: float | None = None
) -> fx.Node:
    return _around(c, x, pads, _MODES[mode], value or 0.0)


@converts(aten.constant_pad_nd.default)
def _constant_pad(c: Context, x: fx.Node, pads: Sequence[int], value: float = 0.0) -> fx.Node:
    return _around(c, x, pads, "constant", value)


@converts(aten.reflection_pad1d.default, aten.reflection_pad2d.default)
def _reflection_pad(c: Context, x: fx.Node, pads: Sequence[int]) -> fx.Node:
    return _around(c, x, pads, "reflect", 0.0)


@converts(aten.replication_pad1d.default, aten.replication_pad2d.default)
def _replication_pad(c: Context, x: fx.Node, pads: Sequence[int]) -> fx.Node:
    return _around(c, x, pads, "edge", 0.0)


def _around(c: Context, x: fx.Node, pads: Sequence[int], mode: str, value: float) -> fx.Node:
    if any(isinstance(p, Dim) for p in pads):
        raise CaptureError(f"the model pads by {tuple(pads)}", why="the dialect pads by fixed widths")
    rank = len(size(x))
    pairs = [(pads[i], pads[i + 1]) for i in range(0, len(pads), 2)]
    return spatial.pad(c.build, x, [(0, 0)] * (rank - len(pairs)) + pairs[::-1], mode, value)


@converts(aten.unfold.default)
def _unfold(c: Context, x: fx.Node, dim: int, length: int, step: int) -> fx.Node:
    """Windows of an axis: their number takes its place, their elements come last."""
    rank = max(len(size(x)), 1)
    dim = dim % rank
    if isinstance(size(x)[dim], Dim):
        raise CaptureError(f"the model takes windows of the size {size(x)[dim]}", fix="make it static")
    starts = np.arange(0, size(x)[dim] - length + 1, step)
    windows = resampling.select(c.build, x, dim, starts[:, None] + np.arange(length))
    order = [d for d in range(rank + 1) if d != dim + 1]
    return c.permute(windows, [*order, dim + 1])


@converts(aten.convolution.default)
def _convolution(
    c: Context, x: fx.Node, weight: fx.Node, bias: fx.Node | None, stride: Any, padding: Any, dilation: Any,
    transposed: bool, output_padding: Any, groups: int,
) -> fx.Node:  # fmt: skip
    rank = len(size(weight)) - 2
    stride, padding, dilation = (each(p, rank) for p in (stride, padding, dilation))
    if transposed:
        return _conv_transpose(c, x, weight, bias, stride, padding, output_padding, groups, dilation)
    return conv(c, x, weight, bias, stride, padding, dilation, groups)


@converts(aten.conv_transpose1d.default, aten.conv_transpose2d.input)
def _conv_transpose(
    c: Context, x: fx.Node, weight: fx.Node, bias: fx.Node | None = None, stride: Any = 1, padding: Any = 0,
    output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
) -> fx.Node:  # fmt: skip
    rank = _conv_rank(weight)
    stride, padding, extra, dilation = (each(p, rank) for p in (stride, padding, output_padding, dilation))
    after = tuple(p - e for p, e in zip(padding, extra, strict=True))
    x = _batched(c, x, rank)
    made = spatial.transposed_convolution(c.build, x, weight, bias, stride, padding, after, dilation, groups)
    return c.reshape(made, c.shape)


@converts(aten.conv1d.default, aten.conv2d.default, aten.conv1d.padding, aten.conv2d.padding)
def conv(
    c: Context, x: fx.Node, weight: fx.Node, bias: fx.Node | None = None, stride: Any = 1, padding: Any = 0,
    dilation: Any = 1, groups: int = 1,
) -> fx.Node:  # fmt: skip
    rank = _conv_rank(weight)
    x, stride, dilation = _batched(c, x, rank), each(stride, rank), each(dilation, rank)
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, size(weight)[2:], strict=True)]
        widths = [(t // 2, t - t // 2) for t in total]
    else:
        widths = [(p, p) for p in each(0 if padding == "valid" else padding, rank)]
    if any(a != b for a, b in widths):
        x = spatial.pad(c.build, x, [(0, 0), (0, 0), *widths], "constant", 0.0)
        widths = [(0, 0)] * rank
    before = tuple(a for a, _ in widths)
    if rank == 1:
        result = c.build.conv1d(
            x, weight, bias, stride=stride[0], padding=before[0], dilation=dilation[0], groups=groups
        )
    else:
        result = c.build.conv2d(
            x, weight, bias, stride=stride, padding=before, dilation=dilation, groups=groups
        )
    return c.reshape(result, c.shape)


def _conv_rank(weight: fx.Node) -> int:
    rank = len(size(weight)) - 2
    if rank not in (1, 2):
        raise CaptureError(
            f"the model has a convolution over {rank} dimensions", why="the dialect has one and two"
        )
    return rank
