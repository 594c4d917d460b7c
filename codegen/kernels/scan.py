"""Kernels that walk one dimension in order: running sums, the place of the largest element, sorting, scattering."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from tersor.codegen.kernels import loops, math
from tersor.codegen.kernels.arguments import function
from tersor.codegen.kernels.base import TensorSpec
from tersor.ir.dims import Shape, product
from tersor.targets import Target

Buffer, Extent = tirx.Buffer, loops.Extent


@dataclass(frozen=True)
class CumSum:
    """Running sums along ``dim`` of an array, in its own dtype (float32 or int64)."""

    shape: Shape
    dim: int
    dtype: str = "float32"

    def name(self) -> str:
        return "cumsum"

    def inputs(self) -> tuple[TensorSpec, ...]:
        return (TensorSpec(self.shape, self.dtype),)

    def outputs(self) -> tuple[TensorSpec, ...]:
        return (TensorSpec(self.shape, self.dtype),)

    def build(self, target: Target) -> tirx.PrimFunc:
        def line(x: Buffer, out: Buffer, start: Expr, stride: Extent, count: Extent, index: Expr) -> None:
            total = T.alloc_buffer((1,), self.dtype, scope="global")
            T.buffer_store(total, tirx.const(0, self.dtype), [0])
            with T.serial(count) as i:
                T.buffer_store(total, total[0] + x[start + i * stride], [0])
                T.buffer_store(out, total[0], [start + i * stride])

        return _build(self, line)


@dataclass(frozen=True)
class ArgMax:
    """int64 position of the largest element along ``dim``, the first of equals; a NaN counts as the largest.

    ``keepdim``: the dimension stays, with size 1.
    """

    shape: Shape
    dim: int
    keepdim: bool = False
    dtype: str = "float32"

    def name(self) -> str:
        return "argmax"

    def inputs(self) -> tuple[TensorSpec, ...]:
        return (TensorSpec(self.shape, self.dtype),)

    def outputs(self) -> tuple[TensorSpec, ...]:
        one = (1,) if self.keepdim else ()
        return (TensorSpec((*self.shape[: self.dim], *one, *self.shape[self.dim + 1 :]), "int64"),)

    def build(self, target: Target) -> tirx.PrimFunc:
        def line(x: Buffer, out: Buffer, start: Expr, stride: Extent, count: Extent, index: Expr) -> None:
            best = T.alloc_buffer((1,), self.dtype, scope="global")
            place = T.alloc_buffer((1,), "int64", scope="global")
            T.buffer_store(best, x[start], [0])
            T.buffer_store(place, tirx.const(0, "int64"), [0])
            with T.serial(count) as i:
                value = math.bind(x[start + i * stride])
                larger = value > best[0]
                if self.dtype.startswith("float"):
                    larger = tirx.Or(larger, tirx.And(value != value, best[0] == best[0]))
                with T.If(larger):
                    with T.Then():
                        T.buffer_store(best, value, [0])
                        T.buffer_store(place, tirx.Cast("int64", i), [0])
            T.buffer_store(out, place[0], [index])

        return _build(self, line)


@dataclass(frozen=True)
class ArgSort:
    """int64 positions of the elements along ``dim`` in order; equals keep theirs, NaN counts as the largest.

    The place of an element is how many come before it: n^2 comparisons, in vectors and without branches.
    """

    shape: Shape
    dim: int
    descending: bool = False
    dtype: str = "float32"

    def name(self) -> str:
        return "argsort"

    def inputs(self) -> tuple[TensorSpec, ...]:
        return (TensorSpec(self.shape, self.dtype),)

    def outputs(self) -> tuple[TensorSpec, ...]:
        return (TensorSpec(self.shape, "int64"),)

    def build(self, target: Target) -> tirx.PrimFunc:
        def smaller(a: Expr, b: Expr) -> Expr:
            if not self.dtype.startswith("float"):
                return a < b
            return tirx.Or(a < b, tirx.And(tirx.EQ(a, a), tirx.NE(b, b)))

        def line(x: Buffer, out: Buffer, start: Expr, stride: Extent, count: Extent, index: Expr) -> None:
            place = T.alloc_buffer((1,), "int64", scope="global")
            with T.serial(count) as i:
                value = math.bind(x[start + i * stride])
                T.buffer_store(place, tirx.const(0, "int64"), [0])
                for first, end in ((True, i), (False, count)):
                    with T.serial(end if first else count - i) as step:
                        other = x[start + (step if first else i + step) * stride]
                        ahead, behind = (value, other) if self.descending else (other, value)
                        # of equals the one that comes first stays first
                        before = tirx.Not(smaller(behind, ahead)) if first else smaller(ahead, behind)
                        T.buffer_store(place, place[0] + tirx.Cast("int64", before), [0])
                T.buffer_store(out, tirx.Cast("int64", i), [start + place[0] * stride])

        return _build(self, line)


@dataclass(frozen=True)
class Scatter:
    """x with ``source`` written, added, ... at ``index`` along ``dim``; see ``scatter`` of the dialect.

    Arguments: x, index int64, source, out. A position outside the dimension writes nothing.
    """

    shape: Shape
    index: Shape
    dim: int
    reduce: str = "none"
    dtype: str = "float32"

    def name(self) -> str:
        return "scatter"

    def inputs(self) -> tuple[TensorSpec, ...]:
        return (
            TensorSpec(self.shape, self.dtype),
            TensorSpec(self.index, "int64"),
            TensorSpec(self.index, self.dtype),
        )

    def outputs(self) -> tuple[TensorSpec, ...]:
        return (TensorSpec(self.shape, self.dtype),)

    def build(self, target: Target) -> tirx.PrimFunc:
        fold = {
            "none": lambda old, new: new, "add": lambda old, new: old + new, "mul": lambda old, new: old * new,
            "amax": math.maximum, "amin": math.minimum,
        }[self.reduce]  # fmt: skip
        with function(self.name()) as (builder, arguments):
            x, index, source = (arguments.declare(f"in_{i}", s) for i, s in enumerate(self.inputs()))
            out = arguments.declare("out", self.outputs()[0])
            x, index, source, out = (loops.flat(b) for b in (x, index, source, out))
            whole, part = arguments.extents(self.shape), arguments.extents(self.index)
            size, count = whole[self.dim], part[self.dim]

            def copy(at: Expr) -> None:
                T.buffer_store(out, x[at], [at])

            def line(number: Expr) -> None:
                others = [*part[: self.dim], *part[self.dim + 1 :]]
                place = [math.bind(p) for p in loops.unravel(number, others)] if others else []
                before, after = place[: self.dim], place[self.dim :]
                with T.serial(count) as i:
                    at = loops.ravel([*before, i, *after], part)
                    target_row = math.bind(index[at])
                    with T.If(tirx.And(target_row >= 0, target_row < size)):
                        with T.Then():
                            to = math.bind(loops.ravel([*before, target_row, *after], whole))
                            T.buffer_store(out, fold(out[to], source[at]), [to])

            loops.rows(product(whole), product(whole), copy)
            loops.rows(product([*part[: self.dim], *part[self.dim + 1 :]]), product(part), line)
        return builder.get()


def _build(kernel: CumSum | ArgMax | ArgSort, line: Callable[..., None]) -> tirx.PrimFunc:
    """``line(x, out, start, stride, count, index)`` for every line along the dimension; ``index`` numbers the lines."""
    with function(kernel.name()) as (builder, arguments):
        x = arguments.declare("x", kernel.inputs()[0])
        out = arguments.declare("out", kernel.outputs()[0])
        x, out = loops.flat(x), loops.flat(out)
        extents = arguments.extents(kernel.shape)
        inner, count = product(extents[kernel.dim + 1 :]), extents[kernel.dim]
        outer = product(extents[: kernel.dim])

        def row(index: Expr) -> None:
            before, after = loops.unravel(index, [outer, inner])
            line(x, out, math.bind(before * count * inner + after), inner, count, index)

        loops.rows(outer * inner, product(extents), row)
    return builder.get()
