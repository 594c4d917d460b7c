"""Activations in codes whose scales are fixed beforehand, from calibration data."""

from __future__ import annotations

from torch import fx

from tersor.ir import Program
from tersor.passes.base import Lossy, Pass, PassResult
from tersor.passes.calibration import Histogram, MinMax, Request
from tersor.passes.context import Context
from tersor.passes.quantize.grid import Grid
from tersor.passes.quantize.places import decoded
from tersor.passes.quantize.ranges import Method, choose_range, rounding_error
from tersor.passes.registry import register


@register("quantize.static")
class StaticActivations(Pass):
    """linear(x, W)  ->  linear(decode(encode(x)), W) with one scale and zero point for all of x.

    Before:  %y = linear(%x, %w, @b)                              %w = dequantize(@w.codes, @w.scale, axis=0)
    After:   %c = quantize(%x, @x.scale, @x.zero_point, dtype='uint8');  %d = dequantize(%c, @x.scale, @x.zero_point)
             %y = linear(%d, %w, @b)

    Legal when the layer's weights are in codes and calibration data reaches its input. Layers of one input share its
    codes. Ranges are measured on the program as it is then, with its weights rounded.

    Source: Jacob et al. 2018; Nagel et al. 2021, section 3.1 (range setting).

    Options: method ("minmax", "percentile", "mse"), percentile (fraction of the values kept by that method).
    """

    method: Method = "mse"
    percentile: float = 0.9999

    numerics = Lossy()
    stage = "quantize.activations"
    acts_on = ("linear",)
    calibrated = True

    def problem(self) -> str | None:
        return None if 0.5 < self.percentile <= 1 else f"percentile={self.percentile}, not in (0.5, 1]"

    def requests(self, program: Program) -> list[Request]:
        places = [node for _, node in self.select(program) if _reason(node) is None]
        return [Request(node, what) for node in places for what in (MinMax(), Histogram())]

    def run(self, program: Program, context: Context) -> PassResult:
        result, grid = PassResult(), Grid(8, symmetric=False)
        encoded: dict[fx.Node, tuple[fx.Node, str, float]] = {}
        chosen = []
        for function, linear in self.select(program):
            if reason := _reason(linear):
                result.skip(linear, reason)
                continue
            seen = [context.statistics.get(Request(linear, what)) for what in (MinMax(), Histogram())]
            if seen[0] is None:
                result.skip(linear, "no calibration data reaches its input")
            else:
                chosen.append((function, linear, *seen))
        for function, linear, extent, histogram in chosen:
            x = linear.args[0]
            if x not in encoded:
                scale, zero = choose_range(self.method, grid, extent, histogram, self.percentile)
                build = function.builder(before=linear, made_by=self.name)
                name = linear.meta.get("site") or linear.name
                stored = build.parameter(f"{name}.input.scale", scale.reshape(()))
                point = build.parameter(f"{name}.input.zero_point", zero.reshape(()))
                codes = build.quantize(x, stored, point, dtype=grid.dtype)
                low, high = -float(zero * scale), float((grid.high - zero) * scale)
                encoded[x] = (
                    build.dequantize(codes, stored, point),
                    f"input in 8 bits from {low:.4g} to {high:.4g}",
                    rounding_error(grid, scale, zero, extent, histogram),
                )
            new, words, lost = encoded[x]
            linear.args = (new, *linear.args[1:])
            result.change(linear, words, input_error=lost)
        return result


def _reason(linear: fx.Node) -> str | None:
    """Why the input of a layer is left as it is; None when it is not."""
    if decoded(linear.args[0]):
        return "its input is in codes already"
    return None if decoded(linear.args[1]) else "its weights are not in codes"
