"""Pooling and depthwise convolution: each output element is made of the window of one channel.

The image is padded beforehand, so no window leaves it: rows of the output are shared out over threads, a row is made
in vectors of neighbouring windows, one tap of all windows at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from tersor.codegen.kernels import loops, math
from tersor.codegen.kernels.arguments import function
from tersor.codegen.kernels.base import TensorSpec
from tersor.ir.dims import Dim, Shape, product
from tersor.targets import Target

Pair = tuple[int, int]


@dataclass(frozen=True)
class Window:
    """How windows lie: ``count`` of them along each axis, ``stride`` apart, taps ``dilation`` apart."""

    kernel: Pair
    count: tuple[int | Dim, int | Dim]
    stride: Pair = (1, 1)
    dilation: Pair = (1, 1)


@dataclass(frozen=True)
class Pool:
    """The largest element ("max") or the mean of each window of a padded image [B, C, H, W].

    ``padding``: so much of the image on each end of an axis is padding that the mean leaves out.
    """

    kind: Literal["max", "mean"]
    shape: Shape
    window: Window
    padding: Pair = (0, 0)

    def name(self) -> str:
        return f"{self.kind}_pool"

    def inputs(self) -> tuple[TensorSpec, ...]:
        return (TensorSpec(self.shape),)

    def outputs(self) -> tuple[TensorSpec, ...]:
        return (TensorSpec((*self.shape[:2], *self.window.count)),)

    def build(self, target: Target) -> tirx.PrimFunc:
        lanes, taps = target.lanes("float32"), product(self.window.kernel)
        initial = tirx.const(float("-inf") if self.kind == "max" else 0.0, f"float32x{lanes}")
        fold = math.maximum if self.kind == "max" else lambda total, value: total + value

        def finish(total: Expr, at: tuple[Expr, Expr], sizes: tuple) -> Expr:
            if self.kind == "max":
                return total
            if self.padding == (0, 0):
                return total * (1.0 / taps)
            inside = [self._inside(axis, at[axis], sizes[axis], lanes if axis else 1) for axis in (0, 1)]
            return total / (math.broadcast(inside[0], lanes) * inside[1])

        return _build(self, target, initial, lambda total, value, *_: fold(total, value), finish)

    def _inside(self, axis: int, at: Expr, size: Expr, lanes: int) -> Expr:
        """How many elements of a window (or of ``lanes`` neighbouring ones) are no padding."""
        at = tirx.Cast("int32", at)
        at = T.ramp(at, 1, lanes) if lanes > 1 else at
        start, pad = at * self.window.stride[axis], self.padding[axis]
        end = math.broadcast(tirx.Cast("int32", tirx.convert(size)) - pad, lanes)
        stop = tirx.min(start + self.window.kernel[axis], end)
        return math.cast(stop - tirx.max(start, tirx.const(pad, start.ty.dtype)), "float32")


@dataclass(frozen=True)
class DepthwiseConv:
    """A convolution of each channel of a padded image [B, C, H, W] by itself; weight [N, 1, kh, kw], N a multiple of C.

    Arguments: x, weight, bias [N] (with ``bias``), out [B, N, H', W'].
    """

    shape: Shape
    channels: int
    window: Window
    bias: bool = True

    def name(self) -> str:
        return "depthwise_conv"

    def inputs(self) -> tuple[TensorSpec, ...]:
        weight = TensorSpec((self.channels, 1, *self.window.kernel))
        return (TensorSpec(self.shape), weight, *([TensorSpec((self.channels,))] if self.bias else []))

    def outputs(self) -> tuple[TensorSpec, ...]:
        return (TensorSpec((self.shape[0], self.channels, *self.window.count)),)

    def build(self, target: Target) -> tirx.PrimFunc:
        lanes, taps = target.lanes("float32"), product(self.window.kernel)

        def multiply(total: Expr, value: Expr, tap: Expr, channel: Expr, extra: list[tirx.Buffer]) -> Expr:
            return total + value * math.broadcast(extra[0][channel * taps + tap], lanes)

        initial = None if self.bias else tirx.const(0.0, f"float32x{lanes}")
        return _build(self, target, initial, multiply, lambda total, at, sizes: total)


def _build(
    kernel: Pool | DepthwiseConv,
    target: Target,
    initial: Expr | None,
    fold: Callable[..., Expr],
    finish: Callable[..., Expr],
) -> tirx.PrimFunc:
    """``fold(total, value, tap, channel, extra)`` over every window's taps, from ``initial`` or the bias."""
    lanes, window = target.lanes("float32"), kernel.window
    with function(kernel.name()) as (builder, arguments):
        x, *extra = [arguments.declare(f"in_{i}", spec) for i, spec in enumerate(kernel.inputs())]
        out = arguments.declare("out", kernel.outputs()[0])
        x, extra, out = loops.flat(x), [loops.flat(e) for e in extra], loops.flat(out)
        (_, sources, height, width), shape = (
            arguments.extents(kernel.shape),
            arguments.extents(kernel.outputs()[0].shape),
        )
        batch, channels, rows, columns = shape
        each = channels // sources
        last = product((batch, sources, height, width)) - 1

        def row(index: Expr) -> None:
            at_batch, channel, line = (math.bind(p) for p in loops.unravel(index, [batch, channels, rows]))
            source = channel if each == 1 else tirx.floordiv(channel, each)
            start = math.bind(((at_batch * sources + source) * height + line * window.stride[0]) * width)

            def vector(offset: Expr, where: Expr | None) -> None:
                total = T.alloc_buffer((lanes,), "float32", scope="global")
                everything = T.ramp(0, 1, lanes)
                first = math.broadcast(extra[1][channel], lanes) if initial is None else initial
                T.buffer_store(total, first, [everything])
                with T.serial(window.kernel[0]) as i:
                    below = math.bind(start + i * (window.dilation[0] * width) + offset * window.stride[1])
                    with T.serial(window.kernel[1]) as j:
                        place = below + j * window.dilation[1]
                        value = _taps(x, place, window.stride[1], lanes, where, last)
                        tap = i * window.kernel[1] + j
                        folded = fold(total[everything], value, tap, channel, extra)
                        T.buffer_store(total, folded, [everything])
                result = finish(total[everything], (line, offset), (height, width))
                loops.store(out, index * columns + offset, result, lanes, where)

            loops.vectors(columns, lanes, vector)

        work = product(shape) * product(window.kernel)
        loops.rows(batch * channels * rows, work, row)
    return builder.get()


def _taps(
    x: tirx.Buffer, place: Expr, stride: int, lanes: int, where: Expr | None, last: loops.Extent
) -> Expr:
    """One tap of neighbouring windows; windows outside of the mask read anything."""
    if stride == 1:
        return loops.load(x, place, lanes, where)
    places = T.ramp(place, stride, lanes)
    if where is not None:
        places = tirx.min(places, math.broadcast(tirx.Cast(_element(places), tirx.convert(last)), lanes))
    return x[places]


def _element(x: Expr) -> str:
    return str(x.ty.dtype).partition("x")[0]
