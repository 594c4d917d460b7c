"""Weights in codes, each rounded to the nearest."""

from __future__ import annotations

from tersor.ir import Program
from tersor.passes.base import PassResult
from tersor.passes.context import Context
from tersor.passes.quantize.places import drop_unread
from tersor.passes.quantize.weights import WeightCodes
from tersor.passes.registry import register


@register("quantize.rtn")
class RoundToNearest(WeightCodes):
    """x W^T  ->  x (s C)^T with 8-bit codes C = round(W / s) and a scale per row (or group) of W.

    Before:  %y = linear(%x, @w, @b)
    After:   %w = dequantize(@w.codes, @w.scale, axis=0);  %y = linear(%x, %w, @b)

    Legal when the weight is a float32 parameter that only linear layers read (an embedding that is tied to the output
    projection stays wide).

    Source: Jacob et al. 2018; per row as in Krishnamoorthi 2018; per group as in Yao et al. 2022 (ZeroQuant).

    Options: bits (2 to 8), group (consecutive inputs that share a scale; None: one scale per row), clip (scales of
    least rounding error).
    """

    def run(self, program: Program, context: Context) -> PassResult:
        result, stored = PassResult(), {}
        figures: dict[str, dict[str, float]] = {}
        functions = {function.graph: function for function in program.functions.values()}
        for linear, weight in self.weights(program, result).items():
            name = linear.args[1].target
            if name not in stored:
                coded = self.nearest(weight)
                stored[name], figures[name] = self.store(program, name, coded), coded.figures(weight)
            self.read(functions[linear.graph], linear, stored[name])
            result.change(linear, self.words(), **figures[name])
        drop_unread(program)
        return result
