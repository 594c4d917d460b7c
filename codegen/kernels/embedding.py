"""Rows of a table by index."""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from tersor.codegen.kernels import loops, math
from tersor.codegen.kernels.arguments import function
from tersor.codegen.kernels.base import TensorSpec
from tersor.codegen.packing import packed
from tersor.ir.dims import Shape
from tersor.targets import Target


@dataclass(frozen=True)
class Embedding:
    """``out[*lead, :] = table[ids[*lead], :]`` for int64 ids and an f32 table [count, size].

    ``panel``: the table is stored as the GEMM packs a weight of ``count`` rows (``packing.pack([table], panel)``),
    so that a tied output projection shares it; 0 for the plain layout.
    An id outside 0..count-1 reads nothing and fills its row with NaN: the ids are only known at run time, and a row
    that looks right would hide the mistake.
    """

    lead: Shape
    count: int
    size: int
    panel: int = 0

    def name(self) -> str:
        return f"embedding_{self.count}x{self.size}" + ("_packed" if self.panel else "")

    def inputs(self) -> tuple[TensorSpec, ...]:
        table = TensorSpec((self.count, self.size))
        if self.panel:
            table = TensorSpec(*packed(self.count, self.size, table.dtype, self.panel))
        return TensorSpec(self.lead, "int64"), table

    def outputs(self) -> tuple[TensorSpec, ...]:
        return (TensorSpec((*self.lead, self.size)),)

    def build(self, target: Target) -> tirx.PrimFunc:
        lanes = target.lanes("float32")
        with function(self.name()) as (builder, arguments):
            ids, table = (
                arguments.declare(n, s) for n, s in zip(("ids", "table"), self.inputs(), strict=True)
            )
            out = arguments.declare("out", self.outputs()[0])
            ids, table, out = loops.flat(ids), loops.flat(table), loops.flat(out)
            rows = arguments.size(self.lead)
            loops.rows(rows, rows * self.size, lambda row: self._row(row, ids, table, out, lanes))
        return builder.get()

    def _row(self, row: Expr, ids: tirx.Buffer, table: tirx.Buffer, out: tirx.Buffer, lanes: int) -> None:
        index = math.bind(ids[row])
        begin, stride = index * self.size, 1
        if self.panel:
            panel, column = tirx.floordiv(index, self.panel), tirx.floormod(index, self.panel)
            begin, stride = panel * (self.size * self.panel) + column, self.panel

        def copy(at: loops.Extent, where: Expr | None) -> None:
            loops.store(out, row * self.size + at, loops.load(table, begin + at, lanes, where), lanes, where)

        def pick(at: Expr) -> None:
            T.buffer_store(out, table[begin + at * stride], [row * self.size + at])

        def missing(at: loops.Extent, where: Expr | None) -> None:
            loops.store(out, row * self.size + at, tirx.const(float("nan"), "float32"), lanes, where)

        with T.If(tirx.And(index >= 0, index < self.count)):
            with T.Then():
                if stride == 1:
                    loops.vectors(self.size, lanes, copy)
                else:
                    with T.serial(self.size) as at:
                        pick(at)
            with T.Else():
                loops.vectors(self.size, lanes, missing)
