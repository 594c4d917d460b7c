"""Data movement and other work whose every output element is computed by itself: one loop nest, one index function.

A kernel says which expression an output element is; the nest around it runs the last dimension innermost (LLVM
vectorises it where the addresses are consecutive) and shares out the others over threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from tersor.codegen.kernels import loops, math
from tersor.codegen.kernels.arguments import function
from tersor.codegen.kernels.base import TensorSpec
from tersor.ir.dims import Dim, Shape, product
from tersor.targets import Target

Position = Sequence[Expr | int]
Read = Callable[[int, Position], Expr]
"""``read(i, position)``: an element of input i."""


class _Mapped:
    """What the kernels here share; each is a frozen dataclass that defines `inputs`, `outputs` and `element`."""

    def inputs(self) -> tuple[TensorSpec, ...]:
        raise AssertionError("defined by each kernel")

    def outputs(self) -> tuple[TensorSpec, ...]:
        raise AssertionError("defined by each kernel")

    def element(self, read: Read, at: Position, number: Callable[[int | Dim], Expr | int]) -> Expr:
        """The output's element at a position; ``number`` turns a dimension into its value at run time."""
        raise AssertionError("defined by each kernel")

    def name(self) -> str:
        return type(self).__name__.lower()

    def build(self, target: Target) -> tirx.PrimFunc:
        (output,) = self.outputs()
        with function(self.name()) as (builder, arguments):
            sources = [arguments.declare(f"in_{i}", spec) for i, spec in enumerate(self.inputs())]
            result = arguments.declare("out", output)

            def read(i: int, position: Position) -> Expr:
                return sources[i][tuple(position)]

            lead, extents = output.shape[:-1], arguments.extents(output.shape)

            def row(index: Expr) -> None:
                # divisions stay out of the innermost loop: LLVM 22 vectorises guarded ones wrongly
                position = [math.bind(p) for p in loops.unravel(index, extents[:-1])]
                with T.serial(extents[-1] if extents else 1) as last:
                    at = [*position, last][: len(extents)]
                    T.buffer_store(result, self.element(read, at, arguments.number), at)

            if extents:
                loops.rows(product(extents[:-1]) if lead else 1, product(extents), row)
            else:
                T.buffer_store(result, self.element(read, [], arguments.number), [])
        return builder.get()


@dataclass(frozen=True)
class Permute(_Mapped):
    """Dimension i of the output is dimension ``dims[i]`` of the input."""

    shape: Shape
    dims: tuple[int, ...]
    dtype: str = "float32"

    def inputs(self) -> tuple[TensorSpec, ...]:
        return (TensorSpec(self.shape, self.dtype),)

    def outputs(self) -> tuple[TensorSpec, ...]:
        return (TensorSpec(tuple(self.shape[d] for d in self.dims), self.dtype),)

    def element(self, read: Read, at: Position, number: Callable) -> Expr:
        return read(0, [at[self.dims.index(i)] for i in range(len(self.dims))])

    def build(self, target: Target) -> tirx.PrimFunc:
        """Where the last dimension stays, rows are read in the order in which they lie: the CPU fetches them ahead."""
        if len(self.dims) < 3 or self.dims[-1] != len(self.dims) - 1:
            return super().build(target)
        with function(self.name()) as (builder, arguments):
            source = arguments.declare("in_0", self.inputs()[0])
            result = arguments.declare("out", self.outputs()[0])
            *lead, rows, size = arguments.extents(self.shape)

            def block(index: Expr) -> None:
                outer = [math.bind(p) for p in loops.unravel(index, lead)]
                with T.serial(rows) as row:
                    with T.serial(size) as last:
                        at = [*outer, row, last]
                        T.buffer_store(result, source[tuple(at)], [at[d] for d in self.dims])

            loops.rows(product(lead), product(arguments.extents(self.shape)), block)
        return builder.get()


@dataclass(frozen=True)
class Slice(_Mapped):
    """``length`` elements from ``start`` along ``dim``, ``step`` apart.

    Symbols of ``start`` that are no extent of the input or output are read off the shapes of ``witnesses``, further
    arguments of which nothing else is used.
    """

    shape: Shape
    dim: int
    start: int | Dim
    length: int | Dim
    step: int = 1
    dtype: str = "float32"
    witnesses: tuple[TensorSpec, ...] = ()

    def inputs(self) -> tuple[TensorSpec, ...]:
        return (TensorSpec(self.shape, self.dtype), *self.witnesses)

    def outputs(self) -> tuple[TensorSpec, ...]:
        shape = (*self.shape[: self.dim], self.length, *self.shape[self.dim + 1 :])
        return (TensorSpec(shape, self.dtype),)

    def element(self, read: Read, at: Position, number: Callable) -> Expr:
        moved = number(self.start) + at[self.dim] * self.step
        return read(0, [*at[: self.dim], moved, *at[self.dim + 1 :]])


@dataclass(frozen=True)
class Concat(_Mapped):
    """The inputs one after the other along ``dim``; ``sizes`` are their extents there."""

    shape: Shape
    dim: int
    sizes: tuple[int | Dim, ...]
    dtype: str = "float32"

    def inputs(self) -> tuple[TensorSpec, ...]:
        before, after = self.shape[: self.dim], self.shape[self.dim + 1 :]
        return tuple(TensorSpec((*before, size, *after), self.dtype) for size in self.sizes)

    def outputs(self) -> tuple[TensorSpec, ...]:
        return (TensorSpec(self.shape, self.dtype),)

    def element(self, read: Read, at: Position, number: Callable) -> Expr:
        ends, end = [], 0
        for size in self.sizes[:-1]:
            end = end + number(size)
            ends.append(end)

        def source(i: int) -> Expr:
            start = ends[i - 1] if i else 0
            along = _clamp(at[self.dim] - start, number(self.sizes[i]))
            value = read(i, [*at[: self.dim], along, *at[self.dim + 1 :]])
            return value if i == len(ends) else tirx.Select(at[self.dim] < ends[i], value, source(i + 1))

        return source(0)


@dataclass(frozen=True)
class Pad(_Mapped):
    """Constant padding with (before, after) elements per dimension, first dimension first."""

    shape: Shape
    pads: tuple[tuple[int, int], ...]
    value: float = 0.0
    dtype: str = "float32"

    def inputs(self) -> tuple[TensorSpec, ...]:
        return (TensorSpec(self.shape, self.dtype),)

    def outputs(self) -> tuple[TensorSpec, ...]:
        shape = tuple(size + a + b for size, (a, b) in zip(self.shape, self.pads, strict=True))
        return (TensorSpec(shape, self.dtype),)

    def element(self, read: Read, at: Position, number: Callable) -> Expr:
        source, inside = [], []
        for i, size, (before, after) in zip(at, self.shape, self.pads, strict=True):
            position = i - before
            if before or after:
                inside += [position >= 0, position < number(size)]
                position = _clamp(position, number(size))
            source.append(position)
        return _guarded(inside, read(0, source), tirx.const(self.value, self.dtype))


@dataclass(frozen=True)
class IndexSelect(_Mapped):
    """Slices along ``dim`` at int64 positions; the index's shape replaces the dimension.

    A position outside the dimension reads nothing: its slice is NaN (0 for integers and booleans).
    """

    shape: Shape
    index: Shape
    dim: int
    dtype: str = "float32"

    def inputs(self) -> tuple[TensorSpec, ...]:
        return TensorSpec(self.shape, self.dtype), TensorSpec(self.index, "int64")

    def outputs(self) -> tuple[TensorSpec, ...]:
        return (TensorSpec((*self.shape[: self.dim], *self.index, *self.shape[self.dim + 1 :]), self.dtype),)

    def element(self, read: Read, at: Position, number: Callable) -> Expr:
        selected, size = read(1, at[self.dim : self.dim + len(self.index)]), number(self.shape[self.dim])
        source = [*at[: self.dim], _clamp(selected, size), *at[self.dim + len(self.index) :]]
        return _checked(selected, size, read(0, source), self.dtype)


@dataclass(frozen=True)
class Gather(_Mapped):
    """``out[..i..] = x[..index[..i..]..]`` along ``dim``; positions outside are treated as in `IndexSelect`."""

    shape: Shape
    index: Shape
    dim: int
    dtype: str = "float32"

    def inputs(self) -> tuple[TensorSpec, ...]:
        return TensorSpec(self.shape, self.dtype), TensorSpec(self.index, "int64")

    def outputs(self) -> tuple[TensorSpec, ...]:
        return (TensorSpec(self.index, self.dtype),)

    def element(self, read: Read, at: Position, number: Callable) -> Expr:
        selected, size = read(1, at), number(self.shape[self.dim])
        value = read(0, [*at[: self.dim], _clamp(selected, size), *at[self.dim + 1 :]])
        return _checked(selected, size, value, self.dtype)


@dataclass(frozen=True)
class Arange(_Mapped):
    """0, 1, ..., length - 1."""

    length: int | Dim
    dtype: str = "int64"

    def inputs(self) -> tuple[TensorSpec, ...]:
        return ()

    def outputs(self) -> tuple[TensorSpec, ...]:
        return (TensorSpec((self.length,), self.dtype),)

    def element(self, read: Read, at: Position, number: Callable) -> Expr:
        return tirx.Cast(self.dtype, at[0])


@dataclass(frozen=True)
class Fill(_Mapped):
    """One value everywhere."""

    shape: Shape
    value: float | int | bool
    dtype: str = "float32"

    def inputs(self) -> tuple[TensorSpec, ...]:
        return ()

    def outputs(self) -> tuple[TensorSpec, ...]:
        return (TensorSpec(self.shape, self.dtype),)

    def element(self, read: Read, at: Position, number: Callable) -> Expr:
        return tirx.const(self.value, self.dtype)


@dataclass(frozen=True)
class Unfold(_Mapped):
    """Windows of an image as columns (im2col), so that a convolution becomes a GEMM.

    Input [B, C, H, W]; output [B, C, kh, kw, H', W']: for each tap of a window its element in every window. Pairs
    hold one entry per spatial dimension; ``windows`` is how many windows there are along each; none leaves the image.
    """

    shape: Shape
    kernel: tuple[int, int]
    windows: Shape
    stride: tuple[int, int]
    dilation: tuple[int, int]

    def inputs(self) -> tuple[TensorSpec, ...]:
        return (TensorSpec(self.shape),)

    def outputs(self) -> tuple[TensorSpec, ...]:
        return (TensorSpec((*self.shape[:2], *self.kernel, *self.windows)),)

    def element(self, read: Read, at: Position, number: Callable) -> Expr:
        source = [at[4 + i] * self.stride[i] + at[2 + i] * self.dilation[i] for i in (0, 1)]
        return read(0, [at[0], at[1], *source])


@dataclass(frozen=True)
class Resample(_Mapped):
    """``out[o] = sum over t of weights[o, t] * x[positions[o, t]]`` along ``dim``, with static ``taps``.

    Arguments: x, positions int64 [out, taps], weights [out, taps]. A position outside the dimension reads its end.
    """

    shape: Shape
    dim: int
    length: int | Dim
    taps: int

    def inputs(self) -> tuple[TensorSpec, ...]:
        table = (self.length, self.taps)
        return TensorSpec(self.shape), TensorSpec(table, "int64"), TensorSpec(table)

    def outputs(self) -> tuple[TensorSpec, ...]:
        return (TensorSpec((*self.shape[: self.dim], self.length, *self.shape[self.dim + 1 :])),)

    def element(self, read: Read, at: Position, number: Callable) -> Expr:
        total: Expr = tirx.const(0.0, "float32")
        for tap in range(self.taps):
            entry = [at[self.dim], tap]
            place = _clamp(read(1, entry), number(self.shape[self.dim]))
            total = total + read(2, entry) * read(0, [*at[: self.dim], place, *at[self.dim + 1 :]])
        return total


@dataclass(frozen=True)
class Rotary(_Mapped):
    """Rotates pairs of channels of every head by position: see ``rotary_embedding`` of the dialect.

    x [batch, length, heads*size]; cos and sin [angle_batch, length, rotated]; ``angle_batch`` is 1 or the batch.
    """

    batch: int | Dim
    length: int | Dim
    heads: int
    size: int
    rotated: int
    interleaved: bool = False
    shared_angles: bool = True

    def inputs(self) -> tuple[TensorSpec, ...]:
        angles = TensorSpec((1 if self.shared_angles else self.batch, self.length, self.rotated))
        return TensorSpec((self.batch, self.length, self.heads * self.size)), angles, angles

    def outputs(self) -> tuple[TensorSpec, ...]:
        # the head is a dimension of its own, so that the innermost loop is over one head's channels
        return (TensorSpec((self.batch, self.length, self.heads, self.size)),)

    def element(self, read: Read, at: Position, number: Callable) -> Expr:
        batch, position, head, channel = at
        base, half = head * self.size, self.rotated // 2

        def x(offset: Expr | int) -> Expr:
            return read(0, [batch, position, base + offset])

        if self.interleaved:
            first = tirx.floormod(channel, 2) == 0
            partner = tirx.Select(first, tirx.min(channel + 1, self.size - 1), channel - 1)
        else:
            first = channel < half
            partner = tirx.Select(first, channel + half, channel - half)  # a valid channel in either case
        inside = channel < self.rotated
        angle = [0 if self.shared_angles else batch, position, tirx.min(channel, self.rotated - 1)]
        sign = tirx.Select(first, tirx.const(-1.0, "float32"), tirx.const(1.0, "float32"))
        turned = x(channel) * read(1, angle) + sign * x(partner) * read(2, angle)
        return turned if self.rotated == self.size else tirx.Select(inside, turned, x(channel))


def _clamp(index: Expr, size: Expr | int) -> Expr:
    """The nearest valid index: elements that a condition rules out are read there and thrown away."""
    return tirx.max(tirx.min(index, size - 1), 0)


def _guarded(conditions: Sequence[Expr], value: Expr, otherwise: Expr) -> Expr:
    """The value where all conditions hold."""
    return tirx.Select(tirx.all(*conditions), value, otherwise) if conditions else value


def _checked(index: Expr, size: Expr | int, value: Expr, dtype: str) -> Expr:
    outside = tirx.const(float("nan") if dtype.startswith("float") else 0, dtype)
    return _guarded([index >= 0, index < size], value, outside)
