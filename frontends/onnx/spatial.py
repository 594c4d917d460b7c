"""ONNX operators over neighbourhoods: convolutions, pooling, Resize, Pad."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import fx

from tersor.frontends import resampling, spatial
from tersor.frontends.onnx.table import Call, converts, size
from tersor.ir import Dim

Widths = tuple[int, ...]


def _operands(c: Call) -> tuple[fx.Node, fx.Node, fx.Node | None, int]:
    """The image, the weight, the bias of a convolution, and over how many dimensions it is."""
    rank = len(size(c.require(1))) - 2
    if rank not in (1, 2):
        raise c.refuse(f"is over {rank} dimensions", why="the dialect has convolutions over one and two")
    return c.node(0), c.node(1), c.optional(2), rank


@converts("Conv")
def _conv(c: Call) -> fx.Node:
    x, weight, bias, rank = _operands(c)
    kernel = size(weight)[2:]
    stride = tuple(c.attribute("strides") or (1,) * rank)
    dilation = tuple(c.attribute("dilations") or (1,) * rank)
    before, after = _padding(c, size(x)[2:], kernel, stride, dilation)
    if before != after:
        widths = [(0, 0), (0, 0), *zip(before, after, strict=True)]
        x, before = spatial.pad(c.build, x, widths, "constant", 0.0), (0,) * rank
    groups = c.attribute("group", 1)
    if rank == 1:
        return c.build.conv1d(
            x, weight, bias, stride=stride[0], padding=before[0], dilation=dilation[0], groups=groups
        )
    return c.build.conv2d(x, weight, bias, stride=stride, padding=before, dilation=dilation, groups=groups)


@converts("ConvTranspose")
def _conv_transpose(c: Call) -> fx.Node:
    x, weight, bias, rank = _operands(c)
    kernel = size(weight)[2:]
    stride, dilation, extra = (
        tuple(c.attribute(name) or (default,) * rank)
        for name, default in (("strides", 1), ("dilations", 1), ("output_padding", 0))
    )
    full = [
        (n - 1) * s + d * (k - 1) + 1 + e
        for n, s, d, k, e in zip(size(x)[2:], stride, dilation, kernel, extra, strict=True)
    ]
    mode, wanted = c.attribute("auto_pad", "NOTSET"), c.attribute("output_shape")
    if wanted or mode.startswith("SAME"):
        wanted = wanted[-rank:] if wanted else [n * s for n, s in zip(size(x)[2:], stride, strict=True)]
        totals = [f - w for f, w in zip(full, wanted, strict=True)]
        if any(isinstance(t, Dim) for t in totals):
            raise c.refuse("pads a dynamic size", fix="export the model with explicit pads")
        small, large = tuple(t // 2 for t in totals), tuple(t - t // 2 for t in totals)
        before, after = (small, large) if mode == "SAME_UPPER" else (large, small)
    else:
        pads = tuple(c.attribute("pads") or (0,) * (2 * rank)) if mode == "NOTSET" else (0,) * (2 * rank)
        before, after = pads[:rank], pads[rank:]
    after = tuple(a - e for a, e in zip(after, extra, strict=True))
    return spatial.transposed_convolution(
        c.build, x, weight, bias, stride, before, after, dilation, c.attribute("group", 1)
    )


def _padding(
    c: Call, sizes: Any, kernel: Any, stride: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Widths before and after each axis."""
    rank, mode = len(stride), c.attribute("auto_pad", "NOTSET")
    if mode == "VALID":
        return (0,) * rank, (0,) * rank
    if mode == "NOTSET":
        pads = tuple(c.attribute("pads") or (0,) * (2 * rank))
        return pads[:rank], pads[rank:]
    widths = []
    for total, k, s, d in zip(sizes, kernel, stride, dilation, strict=True):
        if isinstance(total, Dim):
            raise c.refuse("pads a dynamic size", fix="export the model with explicit pads")
        widths.append(max((-(-total // s) - 1) * s + d * (k - 1) + 1 - total, 0))
    small, large = tuple(w // 2 for w in widths), tuple(w - w // 2 for w in widths)
    return (small, large) if mode == "SAME_UPPER" else (large, small)


# -- pooling


@converts("MaxPool")
def _max_pool(c: Call) -> fx.Node:
    if any(c.operator.outputs[1:]):
        raise c.refuse("returns the positions of its maxima", why="the dialect has no such operation")
    x, kernel, stride, dilation, before, after, beyond = _windows(c)
    after = tuple(a + b for a, b in zip(after, beyond, strict=True))
    return spatial.max_pool(c.build, x, kernel, stride, before, after, dilation)


@converts("AveragePool")
def _average_pool(c: Call) -> fx.Node:
    x, kernel, stride, dilation, before, after, beyond = _windows(c)
    if set(dilation) != {1}:
        raise c.refuse("is dilated", why="the dialect has means over whole windows")
    counted = bool(c.attribute("count_include_pad", 0)) or not any((*before, *after))
    return spatial.avg_pool(c.build, x, kernel, stride, before, after, beyond, counted)


def _windows(c: Call) -> tuple[Any, ...]:
    """x, kernel, stride, dilation, widths before and after, and how far windows reach beyond that."""
    x, kernel = c.node(0), tuple(c.attribute("kernel_shape"))
    rank = len(size(x)) - 2
    if rank not in (1, 2) or len(kernel) != rank:
        raise c.refuse(f"is over {rank} dimensions", why="the dialect pools over one and two")
    stride = tuple(c.attribute("strides") or (1,) * rank)
    dilation = tuple(c.attribute("dilations") or (1,) * rank)
    before, after = _padding(c, size(x)[2:], kernel, stride, dilation)
    beyond = (0,) * rank
    if c.attribute("ceil_mode", 0):
        beyond = spatial.ceiling(size(x)[2:], kernel, stride, before, after, dilation)
    return x, kernel, stride, dilation, before, after, beyond


# -- interpolation


@converts("Resize", since=11)
def _resize(c: Call) -> fx.Node:
    """Axis by axis; sizes are given, or scales by which they are multiplied and cut."""
    x = c.node(0)
    rank = len(size(x))
    axes = c.attribute("axes")
    axes = tuple(range(rank)) if axes is None else tuple(c.axis(a, rank) for a in axes)
    rule = c.attribute("coordinate_transformation_mode", "half_pixel")
    if rule not in resampling.COORDINATES:
        raise c.refuse(f"has the coordinate transformation {rule!r}", why="the dialect resizes whole images")
    if c.attribute("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise c.refuse("keeps the aspect ratio", fix="export the model with its sizes fixed")
    scales: list[float | None]
    if c.given(3) and c.sizes(3):
        outs, scales = list(c.sizes(3)), [None] * len(axes)
    else:
        scales = [float(s) for s in c.constant(2).objects().reshape(-1)]
        outs = [_scaled(size(x)[a], s) for a, s in zip(axes, scales, strict=True)]
    return _resized(c, x, axes, outs, scales, rule)


def _scaled(total: int | Dim, scale: float) -> int | Dim:
    if isinstance(total, Dim):
        return total if scale == 1 else total * scale if scale.is_integer() else -1
    return int(np.floor(total * scale))


def _resized(c: Call, x: fx.Node, axes: Widths, outs: Any, scales: Any, rule: str) -> fx.Node:
    mode, antialias = c.attribute("mode", "nearest"), bool(c.attribute("antialias", 0))
    for axis, out, scale in zip(axes, outs, scales, strict=True):
        total = size(x)[axis]
        if out == total and scale in (None, 1.0):
            continue
        if isinstance(total, Dim) or isinstance(out, Dim):
            raise c.refuse(f"resizes {total} to {out}", why="what is interpolated is decided at capture",
                           fix="make the sizes of images static")  # fmt: skip
        places = resampling.coordinates(total, out, rule, scale)
        if mode == "nearest":
            found = resampling.nearest(places, total, c.attribute("nearest_mode", "round_prefer_floor"))
            x = resampling.select(c.build, x, axis, found)
            continue
        x = resampling.resample(c.build, x, axis, _taps(c, mode, antialias, places, total, out, scale, rule))
    return x


def _taps(
    c: Call, mode: str, antialias: bool, places: Any, total: int, out: int, scale: Any, rule: str
) -> Any:
    a, outside = c.attribute("cubic_coeff_a", -0.75), bool(c.attribute("exclude_outside", 0))
    if antialias and out < total:
        if not rule.endswith("half_pixel"):
            raise c.refuse(f"smooths with the coordinate transformation {rule!r}")
        return resampling.smoothed(total, out, scale, 1 if mode == "linear" else 3, a, outside)
    return (
        resampling.linear(places, total) if mode == "linear" else resampling.cubic(places, total, a, outside)
    )


# -- padding

_MODES = ("constant", "reflect", "edge", "wrap")  # numpy has the same names


@converts("Pad", since=11)
def _pad(c: Call) -> fx.Node:
    x = c.node(0)
    rank, mode = len(size(x)), c.attribute("mode", "constant")
    pads = c.ints(1)
    axes = c.axes(3, rank) if c.given(3) else tuple(range(rank))
    if mode not in _MODES:
        raise c.refuse(f"pads with mode {mode!r}")
    widths = [(0, 0)] * rank
    for axis, low, high in zip(axes, pads[: len(axes)], pads[len(axes) :], strict=True):
        widths[axis] = (low, high)
    return spatial.pad(c.build, x, widths, mode, float(c.number(2, 0.0)))
