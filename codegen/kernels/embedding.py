"""Rows of a table by index."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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
    """``out[*lead, :] = table[ids[*lead], :]`` in f32, for int64 ids and a table of floats [count, size], or of codes.

    ``panel``: the table is stored as the GEMM packs a weight of ``count`` rows (``packing.pack([table], panel)``),
    so that a tied output projection shares it; 0 for the plain layout.
    ``stored``: the dtype of the floats; bf16 ones come as their bit patterns.
    ``codes``: the table is one of codes, a third input has the scales, and the rows that are read are decoded.
    An id outside 0..count-1 reads nothing and fills its row with NaN: the ids are only known at run time, and a row
    that looks right would hide the mistake.
    """

    lead: Shape
    count: int
    size: int
    panel: int = 0
    stored: Literal["float32", "float16", "bfloat16"] = "float32"
    codes: Decoding | None = None

    def __post_init__(self) -> None:
        if bool(self.panel) + bool(self.codes) + (self.stored != "float32") > 1:
            raise ValueError("a table is packed, or stored in 16 bits, or in codes")

    def name(self) -> str:
        form = "packed" if self.panel else self.codes.dtype if self.codes else self.stored
        return f"embedding_{self.count}x{self.size}" + (f"_{form}" if form != "float32" else "")

    def inputs(self) -> tuple[TensorSpec, ...]:
        stored = {"bfloat16": "uint16"}.get(self.stored, self.stored)
        table = TensorSpec((self.count, self.size), self.codes.dtype if self.codes else stored)
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
            if self.stored == "bfloat16":
                values = math.float_of_bf16(values)
            values = math.cast(values, "float32")
            if self.codes and self.codes.zero:
                values = values - math.constant(self.codes.zero, values)
            if self.codes:
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
