"""Weights in codes, each rounded to the nearest."""

from __future__ import annotations

import torch
from torch import fx

from tersor.ir import Program
from tersor.passes.base import Lossy, Pass, PassResult
from tersor.passes.context import Context
from tersor.passes.quantize.grid import Grid
from tersor.passes.quantize.places import plain_weight, readers
from tersor.passes.registry import register


@register("quantize.rtn")
class RoundToNearest(Pass):
    """x W^T  ->  x (s C)^T with 8-bit codes C = round(W / s) and a scale per row (or group) of W.

    Before:  %y = linear(%x, @w, @b)
    After:   %w = dequantize(@w.codes, @w.scale, axis=0);  %y = linear(%x, %w, @b)

    Legal when the weight is a float32 parameter that only linear layers read (an embedding that is tied to the output
    projection stays wide).

    Source: Jacob et al. 2018; per row as in Krishnamoorthi 2018; per group as in Yao et al. 2022 (ZeroQuant).

    Options: bits (2 to 8), group (consecutive inputs that share a scale; None: one scale per row).
    """

    bits: int = 8
    group: int | None = None

    numerics = Lossy()
    stage = "quantize.weights"
    acts_on = ("linear",)
    provides = {"quantized"}

    def problem(self) -> str | None:
        if not 2 <= self.bits <= 8:
            return f"bits={self.bits}, not 2 to 8"
        return "group must be positive" if self.group is not None and self.group < 1 else None

    def run(self, program: Program, context: Context) -> PassResult:
        result, done, read_by = PassResult(), {}, readers(program)
        for function, linear in self.select(program):
            weight = plain_weight(function, linear, read_by)
            if isinstance(weight, str):
                result.skip(linear, weight)
            elif self.group is not None and weight.shape[1] % self.group:
                result.skip(linear, f"its {weight.shape[1]} inputs are not made of groups of {self.group}")
            else:
                name = linear.args[1].target
                if name not in done:
                    done[name] = self.stored(function, linear, name, weight)
                read = function.builder(before=linear, made_by=self.name)
                codes, scale = (read.read(part) for part in done[name])
                form = {"axis": 0} if self.group is None else {"group": self.group}
                new = read.dequantize(codes, scale, **form)
                linear.args = (linear.args[0], new, *linear.args[2:])
                grid = f"{self.bits} bits per {'row' if self.group is None else f'{self.group} inputs'}"
                result.change(linear, f"weights in {grid}")
        for function in program.functions.values():
            function.erase_dead(*function.graph.find_nodes(op="get_attr"))
        program.drop_unused_parameters()
        return result

    def stored(self, function, linear: fx.Node, name: str, weight: torch.Tensor) -> tuple[str, str]:
        """The names of new parameters with the weight's codes and scales."""
        grid = Grid(self.bits)
        scale, _ = grid.fit_rows(weight, self.group)
        spread = scale[:, None] if self.group is None else scale.repeat_interleave(self.group, -1)
        codes = grid.codes(weight, spread).to(torch.int8)
        add = function.parameters.add
        return add(f"{name}.codes", codes), add(f"{name}.scale", scale)
