"""Activations in codes whose scales are fixed beforehand, from calibration data."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import fx

from tersor.ir import Function, Program
from tersor.passes.base import Lossy, Pass, PassResult
from tersor.passes.calibration import Histogram, MinMax, Request, Samples, no_range
from tersor.passes.context import Context
from tersor.passes.quantize.grid import Grid
from tersor.passes.quantize.places import decoded, matrix
from tersor.passes.quantize.ranges import Method, choose_range, rounding_error
from tersor.passes.registry import register

SAMPLES = 256
"""Held-out rows of a layer's input on which its loss is judged."""


@register("quantize.static")
class StaticActivations(Pass):
    """linear(x, W)  ->  linear(decode(encode(x)), W) with one scale and zero point for all of x.

    Before:  %y = linear(%x, %w, @b)                              %w = dequantize(@w.codes, @w.scale, axis=0)
    After:   %c = quantize(%x, @x.scale, @x.zero_point, dtype='uint8');  %d = dequantize(%c, @x.scale, @x.zero_point)
             %y = linear(%d, %w, @b)

    Legal when the layer's weights are in codes and calibration data reaches its input and is not the same there
    throughout: such data says nothing of the range. Layers of one input share its codes, or leave it together. Ranges
    are measured on the program as it is then, with its weights rounded.

    Source: Jacob et al. 2018; Nagel et al. 2021, section 3.1 (range setting).

    Options: method ("minmax", "percentile", "mse"), percentile (fraction of the values kept by that method),
    largest_error (an input of whose rounding a token's output would lose a larger part of its power in some layer, in
    the mean over held-out data, is left to quantize.dynamic; None: none is).
    """

    method: Method = "minmax"
    percentile: float = 0.9999
    largest_error: float | None = None

    numerics = Lossy()
    stage = "quantize.activations"
    acts_on = ("linear",)
    calibrated = True

    def problem(self) -> str | None:
        if self.largest_error is not None and self.largest_error <= 0:
            return f"largest_error={self.largest_error}, not positive"
        return None if 0.5 < self.percentile <= 1 else f"percentile={self.percentile}, not in (0.5, 1]"

    def requests(self, program: Program) -> list[Request]:
        places = [node for _, node in self.select(program) if _reason(node) is None]
        return [request for node in places for request in self._requests(node)]

    def _requests(self, linear: fx.Node) -> list[Request]:
        rows = [Request(linear, Samples(SAMPLES), split="held_out")] if self.largest_error is not None else []
        return [Request(linear, MinMax()), Request(linear, Histogram()), *rows]

    def run(self, program: Program, context: Context) -> PassResult:
        result, grid = PassResult(), Grid(8, symmetric=False)
        inputs: dict[fx.Node, list[tuple[Function, fx.Node]]] = defaultdict(list)
        for function, linear in self.select(program):
            if reason := _reason(linear):
                result.skip(linear, reason)
            elif reason := no_range(context.statistics.get(Request(linear, MinMax())), "its input"):
                result.skip(linear, reason)
            else:
                inputs[linear.args[0]].append((function, linear))
        for x, layers in inputs.items():
            function, first = layers[0]
            extent, histogram, *rows = (context.statistics.get(r) for r in self._requests(first))
            scale, zero = choose_range(self.method, grid, extent, histogram, self.percentile)
            losses = [
                _output_error(grid, scale, zero, sample.rows, *layer)
                for sample in rows
                if sample is not None
                for layer in layers
            ]
            if losses and max(losses) > self.largest_error:
                for (_, linear), lost in zip(layers, losses, strict=True):
                    result.skip(
                        linear, "one scale for its whole input would lose too much", output_error=lost
                    )
                continue
            build = function.builder(before=first, made_by=self.name)
            name = first.meta.get("site") or first.name
            stored = build.parameter(f"{name}.input.scale", scale.reshape(()))
            point = build.parameter(f"{name}.input.zero_point", zero.reshape(()))
            codes = build.quantize(x, stored, point, dtype=grid.dtype)
            coded = build.dequantize(codes, stored, point)
            low, high = -float(zero * scale), float((grid.high - zero) * scale)
            lost = rounding_error(grid, scale, zero, extent, histogram)
            for _, linear in layers:
                linear.args = (coded, *linear.args[1:])
                result.change(linear, f"input in 8 bits from {low:.4g} to {high:.4g}", input_error=lost)
        return result


def _output_error(
    grid: Grid, scale: torch.Tensor, zero: torch.Tensor, rows: torch.Tensor, function: Function, linear: fx.Node
) -> float:  # fmt: skip
    """||(Q(x) - x) W^T||^2 / ||x W^T||^2 of a row, the mean over sampled inputs x [n, channels] of a layer."""
    weight, rows = matrix(function, linear), rows.float()
    power = (rows @ weight.T).square_().sum(1)
    lost = ((grid.round_trip(rows, scale, zero) - rows) @ weight.T).square_().sum(1)
    return (lost / power.clamp(min=torch.finfo(torch.float32).tiny)).mean().item()


def _reason(linear: fx.Node) -> str | None:
    """Why the input of a layer is left as it is; None when it is not."""
    if decoded(linear.args[0]):
        return "its input is in codes already"
    return None if decoded(linear.args[1]) else "its weights are not in codes"
