"""Weights and tables in codes: which layers have them, how they are stored, and how a layer reads them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from tersor.ir import Function, Program
from tersor.ir.matching import is_call
from tersor.passes.base import Lossy, Pass, PassResult
from tersor.passes.context import Context
from tersor.passes.quantize.grid import Grid
from tersor.passes.quantize.places import drop_unread, plain_weight, readers
from tersor.passes.quantize.ranges import clipped_rows
from tersor.passes.sites import site_of


@dataclass(frozen=True)
class Coded:
    """A weight as stored: codes int8 [N, K], and scales f32 [N] or, per group, [N, K / group]."""

    codes: torch.Tensor
    scale: torch.Tensor

    def values(self) -> torch.Tensor:
        """What the codes stand for, f32 [N, K]."""
        scale = self.scale if self.scale.ndim == 2 else self.scale[:, None]
        return self.codes.float() * scale.repeat_interleave(self.codes.shape[1] // scale.shape[1], -1)

    def figures(self, weight: torch.Tensor) -> dict[str, float]:
        """For reports: ||Q(W) - W||^2 / ||W||^2 (0 where W is), and the bytes of W and of what is stored."""
        power = weight.square().sum().item()
        lost = (self.values() - weight).square_().sum().item()
        return {
            "weight_error": lost / power if power else 0.0,
            "bytes_before": weight.nbytes,
            "bytes_after": self.codes.nbytes + self.scale.nbytes,
        }


class WeightCodes(Pass):
    """Base of the passes that store weights of linear layers as codes; they differ in how a weight is rounded.

    Options:
        bits: of a code (2 to 8).
        group: consecutive inputs that share a scale; None: one scale per row.
        clip: whether scales are those of least rounding error, not those that reach the largest weight.
    """

    bits: int = 8
    group: int | None = None
    clip: bool = False

    numerics = Lossy()
    stage = "quantize.weights"
    acts_on = ("linear",)
    provides = {"quantized"}

    def problem(self) -> str | None:
        if not 2 <= self.bits <= 8:
            return f"bits={self.bits}, not 2 to 8"
        return "group must be positive" if self.group is not None and self.group < 1 else None

    @property
    def beside(self) -> tuple[str, ...]:
        """Operations that may read a weight beside those that the pass acts on, and get its codes with them."""
        return ()

    @property
    def grid(self) -> Grid:
        return Grid(self.bits)

    def scales(self, weight: torch.Tensor, group: int | None) -> torch.Tensor:
        """Scales of rows or groups, f32."""
        return (clipped_rows if self.clip else Grid.fit_rows)(self.grid, weight, group)[0]

    def nearest(self, weight: torch.Tensor) -> Coded:
        """Each weight rounded to the nearest code."""
        scale = self.scales(weight, self.group)
        spread = scale[:, None] if self.group is None else scale.repeat_interleave(self.group, -1)
        return Coded(self.grid.codes(weight, spread).to(torch.int8), scale)

    def weights(self, program: Program, result: PassResult) -> dict[fx.Node, torch.Tensor]:
        """The selected layers whose weights can be stored in codes, with these; ``result`` gets the others."""
        found, read_by = {}, readers(program)
        for function, layer in self.select(program):
            weight = plain_weight(function, layer, read_by, *self.beside)
            if isinstance(weight, str):
                result.skip(layer, weight)
            elif self.group is not None and weight.shape[1] % self.group:
                result.skip(layer, f"its {weight.shape[1]} inputs are not made of groups of {self.group}")
            else:
                found[layer] = weight
        return found

    def store(self, program: Program, name: str, coded: Coded) -> tuple[str, str]:
        """The names of new parameters for the codes and scales of the weight ``name``."""
        add = program.parameters.add
        return add(f"{name}.codes", coded.codes), add(f"{name}.scale", coded.scale)

    def read(self, function: Function, layer: fx.Node, stored: tuple[str, str]) -> None:
        """Makes a layer read stored codes."""
        build = function.builder(before=layer, made_by=self.name)
        codes, scale = (build.read(part) for part in stored)
        form = {"axis": 0} if self.group is None else {"group": self.group}
        layer.args = (layer.args[0], build.dequantize(codes, scale, **form), *layer.args[2:])

    def words(self) -> str:
        """The form of the codes."""
        return f"weights in {self.bits} bits per {'row' if self.group is None else f'{self.group} inputs'}"


class Rounding(WeightCodes):
    """Base of the passes that round each number of a weight to the nearest code."""

    def run(self, program: Program, context: Context) -> PassResult:
        result, stored = PassResult(), {}
        figures: dict[str, dict[str, float]] = {}
        read_by = readers(program)
        functions = {function.graph: function for function in program.functions.values()}
        for layer, weight in self.weights(program, result).items():
            name = layer.args[1].target
            if name not in stored:
                coded = self.nearest(weight)
                stored[name], figures[name] = self.store(program, name, coded), coded.figures(weight)
                for other in read_by[name]:
                    if self.beside and is_call(other, *self.beside) and other.args[1].target == name:
                        self.read(functions[other.graph], other, stored[name])
                        result.change(other, f"the codes of {site_of(layer)}")
            self.read(functions[layer.graph], layer, stored[name])
            result.change(layer, self.words(), **figures[name])
        drop_unread(program)
        return result
