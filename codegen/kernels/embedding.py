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
class Decoding:
    """Codes of ``dtype`` (int8 or uint8) stand for (code - ``zero``) * scale, in f32, rounded after either step.

    per_row: each row has a scale of its own, [count, 1]; otherwise there is one, [].
    """

    dtype: str
    per_row: bool = True
    zero: float = 0.0


@dataclass(frozen=True)
class Embedding:
    """``out[*lead, :] = table[ids[*lead], :]`` for int64 ids and an f32 table [count, size], or one of codes.

    ``panel``: the table is stored as the GEMM packs a weight of ``count`` rows (``packing.pack([table], panel)``),
    so that a tied output projection shares it; 0 for the plain layout.
    ``codes``: the table is one of codes, a third input has the scales, and the rows that are read are decoded.
    An id outside 0..count-1 reads nothing and fills its row with NaN: the ids are only known at run time, and a row
    that looks right would hide the mistake.
    """

    lead: Shape
    count: int
    size: int
    panel: int = 0
    codes: Decoding | None = None

    def __post_init__(self) -> None:
        if self.panel and self.codes:
            raise ValueError("a table of codes has the plain layout")

    def name(self) -> str:
        form = "_packed" if self.panel else f"_{self.codes.dtype}" if self.codes else ""
        return f"embedding_{self.count}x{self.size}{form}"

    def inputs(self) -> tuple[TensorSpec, ...]:
        table = TensorSpec((self.count, self.size), self.codes.dtype if self.codes else "float32")
        if self.panel:
            table = TensorSpec(*packed(self.count, self.size, table.dtype, self.panel))
        scales = [TensorSpec((self.count, 1) if self.codes.per_row else ())] if self.codes else []
        return TensorSpec(self.lead, "int64"), table, *scales

    def outputs(self) -> tuple[TensorSpec, ...]:
        return (TensorSpec((*self.lead, self.size)),)

    def build(self, target: Target) -> tirx.PrimFunc:
        lanes = target.lanes("float32")
        with function(self.name()) as (builder, arguments):
            names = ("ids", "table", "scales")
            buffers = [arguments.declare(n, s) for n, s in zip(names, self.inputs(), strict=False)]
            buffers.append(arguments.declare("out", self.outputs()[0]))
            ids, table, *scales, out = map(loops.flat, buffers)
            rows = arguments.size(self.lead)
            loops.rows(rows, rows * self.size, lambda row: self._row(row, ids, table, scales, out, lanes))
        return builder.get()

    def _row(
        self, row: Expr, ids: tirx.Buffer, table: tirx.Buffer, scales: list[tirx.Buffer], out: tirx.Buffer, lanes: int
    ) -> None:  # fmt: skip
        index = math.bind(ids[row])
        begin, stride = index * self.size, 1
        if self.panel:
            panel, column = tirx.floordiv(index, self.panel), tirx.floormod(index, self.panel)
            begin, stride = panel * (self.size * self.panel) + column, self.panel

        def copy(at: loops.Extent, where: Expr | None) -> None:
            values = loops.load(table, begin + at, lanes, where)
            if self.codes:
                values = math.cast(values, "float32")
                if self.codes.zero:
                    values = values - math.constant(self.codes.zero, values)
                values = values * math.broadcast(scale, lanes)
            loops.store(out, row * self.size + at, values, lanes, where)

        def pick(at: Expr) -> None:
            T.buffer_store(out, table[begin + at * stride], [row * self.size + at])

        def missing(at: loops.Extent, where: Expr | None) -> None:
            loops.store(out, row * self.size + at, tirx.const(float("nan"), "float32"), lanes, where)

        with T.If(tirx.And(index >= 0, index < self.count)):
            with T.Then():
                if self.codes:
                    scale = math.bind(scales[0][index if self.codes.per_row else 0])
                if stride == 1:
                    loops.vectors(self.size, lanes, copy)
                else:
                    with T.serial(self.size) as at:
                        pick(at)
            with T.Else():
                loops.vectors(self.size, lanes, missing)
