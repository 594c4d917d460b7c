"""Weights in codes, rounded so that the layer's output changes least."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from tersor.ir import Program
from tersor.passes.base import PassResult
from tersor.passes.calibration import Gram, Pieces, Request, Step, sequential
from tersor.passes.context import Context
from tersor.passes.quantize.error_feedback import Curvature, output_errors, round_with_feedback
from tersor.passes.quantize.places import drop_unread
from tersor.passes.quantize.weights import Coded, WeightCodes
from tersor.passes.registry import register

_NEAREST, _UNREACHED = "to the nearest", "no calibration data reaches its input"


@dataclass(frozen=True)
class _Rounded:
    """A weight in codes, how they were found, and what was measured."""

    coded: Coded
    how: str
    figures: dict[str, float]

    @classmethod
    def of(cls, weight: torch.Tensor, coded: Coded, how: str, **figures: float) -> _Rounded:
        return cls(coded, how, coded.figures(weight) | figures)

    @classmethod
    def kept(cls, pieces: Pieces, values: tuple[str, str]) -> _Rounded | None:
        """What an earlier run made of these inputs and this weight; None when none came so far."""
        if (found := pieces.load(*values)) is None:
            return None
        tensors, note = found
        return cls(Coded(tensors["codes"], tensors["scale"]), note["how"], note["figures"])

    def keep(self, pieces: Pieces, values: tuple[str, str]) -> None:
        note = {"how": self.how, "figures": self.figures}
        pieces.store(values, {"codes": self.coded.codes, "scale": self.coded.scale}, note)


@register("quantize.gptq")
class GPTQ(WeightCodes):
    """x W^T  ->  x (s C)^T with codes C chosen, column by column, for the least error of the output on data.

    Before:  %y = linear(%x, @w, @b)
    After:   %w = dequantize(@w.codes, @w.scale, axis=0);  %y = linear(%x, %w, @b)

    Goes through the program layer by layer: each is fitted to its inputs under the layers before it as they are
    quantized by then. Codes stay only where the output's error on held-out data is not above that of rounding to the
    nearest, which the layer gets otherwise, and where no data reaches it. Inputs that are always 0 in the data are
    rounded to the nearest. A weight of several layers is fitted to the inputs of the first.

    Legal when the weight is a float32 parameter that only linear layers read.

    Source: Frantar et al. 2023 (GPTQ).

    Options: bits, group and clip as of quantize.rtn; act_order (columns of the largest inputs first; with groups it
    needs static_groups); static_groups (scales of groups from the weight as it was); damp (what is added to the
    diagonal, as a fraction of its mean); block (columns at once, which decides about speed only).
    """

    act_order: bool = False
    static_groups: bool = False
    damp: float = 0.01
    block: int = 128

    calibrated = True

    def problem(self) -> str | None:
        if self.act_order and self.group is not None and not self.static_groups:
            return "act_order with groups needs static_groups=True: scales belong to consecutive inputs"
        if self.damp <= 0:
            return f"damp={self.damp}, not positive"
        return "block must be positive" if self.block < 1 else super().problem()

    def run(self, program: Program, context: Context) -> PassResult:
        result, done = PassResult(), {}
        weights = self.weights(program, result)
        if not weights:
            return result
        left, data, seed, pieces = list(weights), context.calibration, context.seed, Pieces(self, context)
        fit = sequential(program, data, seed=seed, title=f"{self.name}, block by block")
        held_out = sequential(program, data, split="held_out", seed=seed, title=None)
        for step, judge in zip(fit, held_out, strict=True):
            for linears in self._lots(step, left):
                new = {n.args[1].target: n for n in reversed(linears) if n.args[1].target not in done}
                for name, rounded in self._rounded(new, weights, step, judge, pieces).items():
                    done[name] = rounded, self.store(program, name, rounded.coded)
                for linear in linears:
                    self._write(program, linear, *done[linear.args[1].target], result)
                    left.remove(linear)
        for linear in left:
            name = linear.args[1].target
            if name not in done:
                rounded = _Rounded.of(
                    weights[linear], self.nearest(weights[linear]), f"{_NEAREST}: {_UNREACHED}"
                )
                done[name] = rounded, self.store(program, name, rounded.coded)
            self._write(program, linear, *done[name], result)
        drop_unread(program)
        return result

    def _lots(self, step: Step, left: list[fx.Node]) -> list[list[fx.Node]]:
        """The layers of a block by their inputs, in order."""
        by_input: dict[fx.Node, list[fx.Node]] = {}
        for linear in step.calls("linear"):
            if linear in left:
                by_input.setdefault(linear.args[0], []).append(linear)
        return list(by_input.values())

    def _rounded(
        self, layers: dict[str, fx.Node], weights: dict[fx.Node, torch.Tensor], step: Step, judge: Step,
        pieces: Pieces,
    ) -> dict[str, _Rounded]:  # fmt: skip
        """The weights of these layers in codes, by name; those that an earlier run had finished are taken from it."""
        if not layers:
            return {}
        digests, parameters = step.program.main.value_digests(), step.program.parameters
        keys = {name: (digests[n.args[0]], parameters[name].digest) for name, n in layers.items()}
        found = {name: kept for name in layers if (kept := _Rounded.kept(pieces, keys[name])) is not None}
        if rest := {name: linear for name, linear in layers.items() if name not in found}:
            for name, rounded in self._fitted(rest, weights, step, judge).items():
                found[name] = rounded
                rounded.keep(pieces, keys[name])
        return found

    def _fitted(
        self, layers: dict[str, fx.Node], weights: dict[fx.Node, torch.Tensor], step: Step, judge: Step
    ) -> dict[str, _Rounded]:
        """The same for layers of one input that are not finished."""
        any_of_them = next(iter(layers.values()))
        fit, held_out = Request(any_of_them, Gram()), Request(any_of_them, Gram(), split="held_out")
        gram, judging = step.gather([fit]).get(fit), judge.gather([held_out]).get(held_out)
        curvature, why_not = None, _UNREACHED
        if gram is not None and judging is not None:
            curvature = Curvature.of(gram.total, gram.count, self.damp, self.act_order)
            why_not = "the squares of its inputs overflow"
        if curvature is None:
            plain = {name: weights[linear] for name, linear in layers.items()}
            return {n: _Rounded.of(w, self.nearest(w), f"{_NEAREST}: {why_not}") for n, w in plain.items()}
        held_out_gram = judging.total
        return {
            name: self._better(weights[linear], curvature, held_out_gram, gram.count)
            for name, linear in layers.items()
        }

    def _better(
        self, weight: torch.Tensor, curvature: Curvature, judging: torch.Tensor, count: int
    ) -> _Rounded:
        """Codes fitted to ``count`` rows where their error on those of ``judging`` is not above that of the nearest."""
        nearest = self.nearest(weight)
        coded = round_with_feedback(
            weight, curvature, self.grid, self.scales,
            group=self.group, static_groups=self.static_groups, block=self.block,
        )  # fmt: skip
        errors = output_errors(weight, (nearest, coded), judging)
        figures = {
            "error_nearest": errors[0],
            "error_gptq": errors[1],
            "tokens_per_input": count / weight.shape[1],
        }
        if figures["error_gptq"] <= figures["error_nearest"]:
            return _Rounded.of(weight, coded, "fitted to data", **figures)
        return _Rounded.of(weight, nearest, f"{_NEAREST}, which loses less on held-out data", **figures)

    def _write(
        self,
        program: Program,
        linear: fx.Node,
        rounded: _Rounded,
        stored: tuple[str, str],
        result: PassResult,
    ) -> None:
        function = next(f for f in program.functions.values() if f.graph is linear.graph)
        self.read(function, linear, stored)
        result.change(linear, f"{self.words()}, {rounded.how}", **rounded.figures)
