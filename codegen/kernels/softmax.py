"""Softmax over the last dimension (inside attention it is part of the attention kernel)."""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx
from tvm.ir import Expr

from tersor.codegen.kernels import loops, math
from tersor.codegen.kernels.arguments import function
from tersor.codegen.kernels.base import TensorSpec
from tersor.codegen.kernels.reduction import plus, reduce
from tersor.ir.dims import Shape
from tersor.targets import Target


@dataclass(frozen=True)
class Softmax:
    """``exp(x - max) / sum(exp(x - max))`` over the last dimension (``log``: its logarithm) of an f32 array.

    A row of -inf only gives NaN, as in torch.
    """

    shape: Shape
    log: bool = False

    def name(self) -> str:
        return "log_softmax" if self.log else "softmax"

    def inputs(self) -> tuple[TensorSpec, ...]:
        return (TensorSpec(self.shape),)

    def outputs(self) -> tuple[TensorSpec, ...]:
        return (TensorSpec(self.shape),)

    def build(self, target: Target) -> tirx.PrimFunc:
        lanes = target.lanes("float32")
        with function(self.name()) as (builder, arguments):
            x, out = (
                arguments.declare("x", TensorSpec(self.shape)),
                arguments.declare("out", TensorSpec(self.shape)),
            )
            x, out = loops.flat(x), loops.flat(out)
            rows, size = arguments.size(self.shape[:-1]), arguments.size(self.shape[-1:])
            loops.rows(rows, rows * size * 4, lambda row: self._row(row * size, size, x, out, lanes))
        return builder.get()

    def _row(self, start: Expr, size: loops.Extent, x: tirx.Buffer, out: tirx.Buffer, lanes: int) -> None:
        extent, lowest = loops.split(size, lanes), tirx.const(float("-inf"), "float32")

        def read(at: loops.Extent, where: Expr | None) -> Expr:
            value = loops.load(x, start + at, lanes, where)
            return value if where is None else tirx.Select(where, value, math.broadcast(lowest, lanes))

        # a NaN may be lost in the maximum: it comes back through the sum
        top = reduce(*extent, lanes, read, tirx.max, lowest)
        top = math.bind(math.broadcast(top, lanes))

        def weight(at: loops.Extent, where: Expr | None) -> Expr:
            value = math.bind(math.exp_nonpositive(read(at, where) - top))
            if not self.log:
                loops.store(out, start + at, value, lanes, where)
            return value

        total = reduce(*extent, lanes, weight, plus, tirx.const(0.0, "float32"))
        factor = math.log(total) if self.log else 1.0 / total
        factor = math.bind(math.broadcast(factor, lanes))

        def finish(at: loops.Extent, where: Expr | None) -> None:
            if self.log:
                value = loops.load(x, start + at, lanes, where) - top - factor
            else:
                value = loops.load(out, start + at, lanes, where) * factor
            loops.store(out, start + at, value, lanes, where)

        loops.vectors(size, lanes, finish)
