"""Convolutions of codes as linear layers of codes, which integer products know."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from tersor.ir import Builder, Dim, Function
from tersor.ir.dims import product
from tersor.passes.quantize.places import Decoded, bias_of, decoded, number
from tersor.passes.windows import replace_by_layer


def unfit(function: Function, conv: fx.Node) -> str | None:
    """Why a convolution between codes cannot be a linear layer between them; None when it can."""
    x, weight = decoded(conv.args[0]), decoded(conv.args[1])
    if x is None and weight is None:
        return "it is not quantized"
    if x is None:
        return "its input is not in codes"
    if weight is None or function.parameter(weight.codes) is None:
        return "its weights are not stored codes"
    form = conv.target.bind(conv.args, conv.kwargs)
    if form["groups"] != 1:
        return "it has groups"
    if x.scale.meta["value"].rank or x.axis is not None or x.group is not None:
        return "its input does not have one scale"
    if isinstance(x.zero, fx.Node) and x.zero.meta["value"].rank:
        return "its input does not have one zero point"
    kernel = weight.codes.meta["value"].shape[2:]
    for size, k, step in zip(
        x.codes.meta["value"].shape[2:], kernel, _each(form["stride"], kernel), strict=True
    ):
        if isinstance(size, Dim) and step not in (1, k):
            return f"its windows lie {step} apart on a dimension that varies, {size}"
    return None


def to_linear(function: Function, conv: fx.Node, made_by: str) -> fx.Node:
    """conv(decode(a), decode(W), b)  ->  linear(decode(windows of a [B, P, C k]), decode(W as [N, C k]), b)."""
    x, weight = decoded(conv.args[0]), decoded(conv.args[1])
    build = function.builder(before=conv, made_by=made_by)
    windows = _windows(build, function, conv, x, weight.codes.meta["value"].shape[2:])
    rows = build.parameter(weight.codes.target, function.parameter(weight.codes).flatten(1))
    return replace_by_layer(
        function, conv, made_by,
        build.dequantize(windows, *x.node.args[1:]),
        build.dequantize(rows, *weight.node.args[1:], **weight.node.kwargs),
        bias_of(conv),
    )  # fmt: skip


def _windows(build: Builder, function: Function, conv: fx.Node, x: Decoded, kernel: Sequence[int]) -> fx.Node:
    """The codes in each window: [B, C, ...] -> [B, P, C k] for P windows of k = product(kernel) codes per channel.

    Axis by axis, each of which becomes two: [..., size] -> [..., k, P].
    """
    form, spatial = conv.target.bind(conv.args, conv.kwargs), len(kernel)
    strides, paddings, dilations = (_each(form[key], kernel) for key in ("stride", "padding", "dilation"))
    codes = _padded(build, function, x, paddings)
    counts = conv.meta["value"].shape[2:]
    for axis, (k, count, step, apart) in enumerate(zip(kernel, counts, strides, dilations, strict=True)):
        # before this axis: batch, channels, a kernel for each axis done, their windows
        codes = _split(build, codes, 2 + axis, 2 + 2 * axis, k, count, step, apart)
    first, last = range(2, 2 + spatial), range(2 + spatial, 2 + 2 * spatial)
    codes = build.permute(codes, dims=(0, *last, 1, *first))
    batch, channels = x.codes.meta["value"].shape[:2]
    return build.reshape(codes, shape=(batch, product(counts), channels * product(kernel)))


def _split(
    build: Builder, codes: fx.Node, front: int, dim: int, k: int, count: int | Dim, step: int, apart: int
) -> fx.Node:  # fmt: skip
    """The axis ``dim`` as its ``count`` windows of k codes, and the place in the window as a new axis at ``front``."""
    shape = codes.meta["value"].shape
    if k == step and apart == 1:  # side by side
        tiled = _part(build, codes, dim, 0, count * k, 1)
        tiled = build.reshape(tiled, shape=(*shape[:dim], count, k, *shape[dim + 1 :]))
        order = [i for i in range(len(shape) + 1) if i != dim + 1]
        return build.permute(tiled, dims=(*order[:front], dim + 1, *order[front:]))
    places = []
    for start in range(0, k * apart, apart):
        place = _part(build, codes, dim, start, start + (count - 1) * step + 1, step)
        size = place.meta["value"].shape
        places.append(build.reshape(place, shape=(*size[:front], 1, *size[front:])))
    return places[0] if k == 1 else build.concat(places, dim=front)


def _part(build: Builder, x: fx.Node, dim: int, start: int, end: int | Dim, step: int) -> fx.Node:
    if (start, end, step) == (0, x.meta["value"].shape[dim], 1):
        return x
    return build.slice(x, dim=dim, start=start, end=end, step=step)


def _padded(build: Builder, function: Function, x: Decoded, widths: Sequence[int]) -> fx.Node:
    """The codes with those of 0 on both ends of each spatial axis."""
    codes = x.codes
    if (zero := number(function, x.zero)) is not None:
        pads = tuple(width for width in reversed(widths) for _ in range(2))
        return build.pad(codes, pads=pads, value=zero) if any(pads) else codes
    for dim, width in enumerate(widths, 2):
        if width:
            shape = codes.meta["value"].shape
            zero = build.reshape(build.cast(x.zero, dtype="uint8"), shape=(1,) * len(shape))
            ends = build.expand(zero, shape=(*shape[:dim], width, *shape[dim + 1 :]))
            codes = build.concat([ends, codes, ends], dim=dim)
    return codes


def _each(value: Any, kernel: Sequence[int]) -> tuple[int, ...]:
    """An attribute for each axis: conv1d has a number, conv2d two."""
    return (value,) * len(kernel) if isinstance(value, int) else tuple(value)
