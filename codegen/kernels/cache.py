"""Slices of a tensor replaced, at positions that are known at run time."""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from tersor.codegen.kernels import loops, math
from tersor.codegen.kernels.arguments import function
from tersor.codegen.kernels.base import TensorSpec
from tersor.codegen.runtime.session import OUTSIDE
from tersor.ir.dims import Dim, Shape, product
from tersor.targets import Target


@dataclass(frozen=True)
class CacheUpdate:
    """``value`` written into ``shape`` along ``dim``, ``length`` slices at int64 positions.

    positions: of each slice, [length], if ``scattered``; else of the first one, ().
    in_place: the output holds the old contents already. Otherwise they are a third input, which is copied.

    All positions are looked at before anything is written: one outside is an error of the call (`OUTSIDE`).
    """

    shape: Shape
    dim: int
    length: int | Dim
    dtype: str = "float32"
    scattered: bool = False
    in_place: bool = True

    def name(self) -> str:
        return "cache_update" if self.in_place else "cache_update_of_copy"

    def inputs(self) -> tuple[TensorSpec, ...]:
        value = TensorSpec((*self.shape[: self.dim], self.length, *self.shape[self.dim + 1 :]), self.dtype)
        positions = TensorSpec((self.length,) if self.scattered else (), "int64")
        return (value, positions, *(() if self.in_place else self.outputs()))

    def outputs(self) -> tuple[TensorSpec, ...]:
        return (TensorSpec(self.shape, self.dtype),)

    def build(self, target: Target) -> tirx.PrimFunc:
        lanes = target.lanes(self.dtype)
        with function(self.name()) as (builder, arguments):
            value, positions, *old = (
                arguments.declare(f"in_{i}", spec) for i, spec in enumerate(self.inputs())
            )
            out = arguments.declare("out", self.outputs()[0])
            value, positions, out, *old = map(loops.flat, (value, positions, out, *old))
            *lead, length = arguments.extents((*self.shape[: self.dim], self.length))
            room, *tail = arguments.extents(self.shape[self.dim :])
            size = product(tail)

            def move(source: tirx.Buffer, row: Expr, target_row: Expr) -> None:
                def piece(at: loops.Extent, where: Expr | None) -> None:
                    loaded = loops.load(source, row * size + at, lanes, where)
                    loops.store(out, target_row * size + at, loaded, lanes, where)

                loops.vectors(size, lanes, piece)

            def place(row: Expr) -> None:
                outer, slice_ = (math.bind(p) for p in loops.unravel(row, [product(lead), length]))
                at = positions[slice_] if self.scattered else positions[0] + slice_
                move(value, row, math.bind(outer * room + at))

            self._check(positions, length, room)
            if old:
                rows = product(lead) * room
                loops.rows(rows, rows * size, lambda row: move(old[0], row, row))
            rows = product(lead) * length
            loops.rows(rows, rows * size, place)
        return builder.get()

    def _check(self, positions: tirx.Buffer, length: loops.Extent, room: loops.Extent) -> None:
        if self.scattered:
            with T.serial(length) as i:
                _demand(tirx.And(positions[i] >= 0, positions[i] < room))
        else:
            _demand(tirx.And(positions[0] >= 0, positions[0] <= room - length))


def _demand(condition: Expr) -> None:
    with T.Assert(condition, OUTSIDE):
        pass
