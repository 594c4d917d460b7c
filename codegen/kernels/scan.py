"""Kernels that walk one dimension in order: running sums and the place of the largest element."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from tersor.codegen.kernels import loops, math
from tersor.codegen.kernels.arguments import Arguments
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


def _build(kernel: CumSum | ArgMax, line: Callable[..., None]) -> tirx.PrimFunc:
    """``line(x, out, start, stride, count, index)`` for every line along the dimension; ``index`` numbers the lines."""
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name(kernel.name())
            T.func_attr({"tirx.noalias": True})
            arguments = Arguments()
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
