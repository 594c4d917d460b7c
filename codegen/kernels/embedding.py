"""Rows of a table by index."""

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
from tersor.codegen.packing import ELEMENTS, Words, packed
from tersor.ir.dims import Shape, product
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

    ``panel``: the table is stored as the GEMM packs a weight of ``count`` rows, so that a tied output projection shares
    it (``packing.pack([table], panel, words)``); 0 for the plain layout.
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
    words: Words | None = None

    def __post_init__(self) -> None:
        if self.stored != "float32" and (self.panel or self.codes):
            raise ValueError("a table is packed, or in codes, or stored in 16 bits")
        if self.panel and self._dtype not in ELEMENTS or self.words and not (self.panel and self.codes):
            raise ValueError("packed tables are of float32, or of int8 codes in words")

    def name(self) -> str:
        form = f"_{self._dtype}" if self._dtype != "float32" else ""
        return f"embedding_{self.count}x{self.size}{form}" + ("_packed" if self.panel else "")

    @property
    def _dtype(self) -> str:
        """What the table holds."""
        return self.codes.dtype if self.codes else self.stored

    def inputs(self) -> tuple[TensorSpec, ...]:
        table = TensorSpec((self.count, self.size), {"bfloat16": "uint16"}.get(self._dtype, self._dtype))
        if self.panel:
            table = TensorSpec(*packed(self.count, self.size, table.dtype, self.panel, words=self.words))
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
            if self.codes and self.panel:  # words of four codes each
                table = T.decl_buffer((4 * product(table.shape),), "int8", data=table.data)
            rows = arguments.size(self.lead)
            loops.rows(rows, rows * self.size, lambda row: self._row(row, ids, table, scales, out, lanes))
        return builder.get()

    def _row(
        self, row: Expr, ids: tirx.Buffer, table: tirx.Buffer, scales: list[tirx.Buffer], out: tirx.Buffer, lanes: int
    ) -> None:  # fmt: skip
        index = math.bind(ids[row])

        def move(begin: Expr, at: loops.Extent, lanes: int, where: Expr | None = None) -> None:
            """Neighbours of the table, from ``begin`` on, to the row from ``at`` on."""
            values = loops.load(table, begin, lanes, where) if lanes > 1 else table[begin]
            if self.stored == "bfloat16":
                values = math.float_of_bf16(values)
            values = math.cast(values, "float32")
            if self.codes and self.codes.zero:
                values = values - math.constant(self.codes.zero, values)
            if self.codes:
                values = values * math.broadcast(scale, lanes)
            if lanes > 1:
                loops.store(out, row * self.size + at, values, lanes, where)
            else:
                T.buffer_store(out, values, [row * self.size + at])

        def missing(at: loops.Extent, where: Expr | None) -> None:
            loops.store(out, row * self.size + at, tirx.const(float("nan"), "float32"), lanes, where)

        with T.If(tirx.And(index >= 0, index < self.count)):
            with T.Then():
                if self.codes:
                    scale = math.bind(scales[0][index if self.codes.per_row else 0])
                if self.panel:
                    self._unpack(index, move)
                else:
                    begin = index * self.size
                    loops.vectors(self.size, lanes, lambda at, where: move(begin + at, at, lanes, where))
            with T.Else():
                loops.vectors(self.size, lanes, missing)

    def _unpack(self, index: Expr, move: Callable[[Expr, loops.Extent, int], None]) -> None:
        """A row of a packed table: runs of as many neighbours as its words hold, a row of the panel apart."""
        run = self.words.elements if self.words else ELEMENTS[self._dtype]
        steps = packed(self.count, self.size, self._dtype, self.panel, words=self.words)[0][1]
        begin = tirx.floordiv(index, self.panel) * (steps * self.panel * run)
        begin = math.bind(begin + tirx.floormod(index, self.panel) * run)
        full, rest = divmod(self.size, run)
        with T.serial(full) as step:
            move(begin + step * (self.panel * run), step * run, run)
        for i in range(rest):
            move(begin + full * (self.panel * run) + i, full * run + i, 1)
