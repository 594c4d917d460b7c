"""Biases that take up the mean error of quantized layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx

from tersor.ir import Function, Program
from tersor.passes.base import Lossy, Pass, PassResult
from tersor.passes.calibration import Pieces, Request, Samples, Statistics, Step, calibrate, sequential
from tersor.passes.calibration.requests import Split
from tersor.passes.context import Context
from tersor.passes.quantize.places import bias_of, decoded, drop_unread, matrix
from tersor.passes.recover.reference import correctable, counterparts
from tersor.passes.registry import register

SPLITS: tuple[Split, Split] = ("fit", "held_out")

GAIN = 0.99
"""A bias changes where the error on held-out data falls at least to this fraction."""


@register("recover.bias")
class BiasCorrection(Pass):
    """b  ->  b + mean(y - y'): a quantized layer's outputs y' are, in the mean, what they were before.

    Before:  %y = linear(%x, %w, @b)              %w = dequantize(@w.codes, @w.scale, axis=0)
    After:   %y = linear(%x, %w, @b')             b' = b + mean of (y before quantization - y now)

    Rounding weights moves the mean of an output by what the mean of the inputs makes of it, and clipping inputs moves
    it too; a bias takes that back for nothing. Layers are corrected in order, each with what the ones before it give
    now. Tokens count by 1 / |y|^2, so that the mean is of relative errors. A change stays only where it lowers these on
    held-out data. A layer without a bias gets one.

    Legal when the weights are in codes, the bias is a parameter or absent, and the layer was there before the lossy
    passes, under the same name and with outputs of the same shape.

    Source: Nagel et al. 2019 (Data-Free Quantization), section 4.2, with means from data.

    Options: samples (how many tokens to look at, and as many held-out ones to judge by).
    """

    samples: int = 1024

    numerics = Lossy()
    stage = "recover.bias"
    acts_on = ("linear",)
    calibrated = True
    recovers = True

    def problem(self) -> str | None:
        return None if self.samples > 0 else f"samples = {self.samples} should be positive"

    def run(self, program: Program, context: Context) -> PassResult:
        result, data = PassResult(), context.calibration
        before = counterparts(program, context.reference, "linear")
        places = correctable(self, program, before, _obstacle, _stored, result)
        if not places:
            return result
        wanted = calibrate(
            context.reference,
            [self._rows(before[linear], "output", split) for linear in places for split in SPLITS],
            data, seed=context.seed, cache=context.cache, title=f"{self.name}, outputs before",
        )  # fmt: skip
        pieces, then = Pieces(self, context), context.reference.main.value_digests()
        fit = sequential(program, data, seed=context.seed, title=f"{self.name}, block by block")
        held_out = sequential(program, data, split="held_out", seed=context.seed, title=None)
        for step, judge in zip(fit, held_out, strict=True):
            lots: dict[fx.Node, list[fx.Node]] = {}
            for linear in step.calls("linear"):
                if linear in places:
                    lots.setdefault(linear.args[0], []).append(linear)
            for linears in lots.values():
                now = program.main.value_digests()
                keys = {n: (now[n], then[before[n]]) for n in linears}
                shifts = {n: shift for n in linears if (shift := _Shift.kept(pieces, keys[n])) is not None}
                if rest := [n for n in linears if n not in shifts]:
                    shifts |= self._shifts(program.main, rest, before, wanted, step, judge)
                for linear in linears:
                    if linear in rest and shifts[linear] is not None:
                        shifts[linear].keep(pieces, keys[linear])
                    self._correct(program, linear, places[linear], shifts[linear], result)
        drop_unread(program)
        return result

    def _rows(self, linear: fx.Node, of: Literal["input", "output"], split: Split) -> Request:
        return Request(linear, Samples(self.samples), of=of, split=split)

    def _shifts(
        self,
        function: Function,
        linears: list[fx.Node],
        before: dict[fx.Node, fx.Node],
        wanted: Statistics,
        step: Step,
        judge: Step,
    ) -> dict[fx.Node, _Shift | None]:
        """By how much to move the outputs of layers of one input; None for those that no data reaches."""
        inputs = []
        for s, split in zip((step, judge), SPLITS, strict=True):
            request = self._rows(linears[0], "input", split)
            inputs.append(s.gather([request]).get(request))
        shifts: dict[fx.Node, _Shift | None] = {}
        for linear in linears:
            outputs = [wanted.get(self._rows(before[linear], "output", split)) for split in SPLITS]
            if any(found is None for found in (*inputs, *outputs)):
                shifts[linear] = None
                continue
            # equal seeds draw the same tokens from both programs
            shifts[linear] = _Shift.of(
                *(
                    (was.rows, _outputs(function, linear, x.rows))
                    for was, x in zip(outputs, inputs, strict=True)
                )
            )
        return shifts

    def _correct(
        self,
        program: Program,
        linear: fx.Node,
        others: list[fx.Node],
        shift: _Shift | None,
        result: PassResult,
    ) -> None:
        if shift is None:
            result.skip(linear, "no calibration data reaches it")
            return
        figures = {"error_before": shift.error_before, "error_after": shift.error_after}
        if not shift.error_after <= GAIN * shift.error_before:
            result.skip(linear, "its outputs would not be nearer on held-out data", **figures)
            return
        functions = {function.graph: function for function in program.functions.values()}
        bias, value = bias_of(linear), shift.value
        if bias is not None:
            value = value + program.parameters[bias.target].tensor.double()
        name = bias.target if bias is not None else f"{linear.meta.get('site') or linear.name}.bias"
        name = program.parameters.add(name, value.float())
        for layer in (linear, *others):
            build = functions[layer.graph].builder(before=layer, made_by=self.name)
            layer.args = (*layer.args[:2], build.read(name))
        result.change(linear, "bias corrected" if bias is not None else "bias added", **figures)


@dataclass(frozen=True)
class _Shift:
    """How far a layer's outputs are from what they were.

    Attributes:
        value: the mean difference over the tokens to fit to, weighted as the error is, float64 [N].
        error_before, error_after: |y - y'|^2 / |y|^2, the mean over held-out tokens, now and with the shift.
    """

    value: torch.Tensor
    error_before: float
    error_after: float

    @classmethod
    def of(cls, fit: _Pair, held_out: _Pair) -> _Shift:
        """From outputs before and now [n, N], at the same tokens."""
        lost, weights = _errors(*fit)
        shift = (lost * weights).sum(0) / weights.sum()
        lost, weights = _errors(*held_out)
        errors = ((d.square() * weights).sum().item() / len(d) for d in (lost, lost - shift))
        return cls(shift, *errors)

    @classmethod
    def kept(cls, pieces: Pieces, values: tuple[str, str]) -> _Shift | None:
        """What an earlier run found for a layer as it is now and as it was; None when none came so far."""
        if (found := pieces.load(*values)) is None:
            return None
        return cls(found[0]["value"], *found[1])

    def keep(self, pieces: Pieces, values: tuple[str, str]) -> None:
        pieces.store(values, {"value": self.value}, [self.error_before, self.error_after])


_Pair = tuple[torch.Tensor, torch.Tensor]


def _errors(before: torch.Tensor, now: torch.Tensor) -> _Pair:
    """What each token lost [n, N], and its weight 1 / |y|^2 [n, 1].

    Without weights the few tokens whose values are some hundred times as large as all others (the first or the
    separators) would decide alone; norms behind the layer make tokens equals.
    """
    before, now = before.double(), now.double()
    power = before.square().sum(1, keepdim=True)
    return before - now, 1 / power.clamp(min=max(1e-6 * power.mean().item(), 1e-30))


def _outputs(function: Function, linear: fx.Node, rows: torch.Tensor) -> torch.Tensor:
    """What a layer gives for inputs [n, K]."""
    bias = bias_of(linear)
    return torch.nn.functional.linear(
        rows, matrix(function, linear), None if bias is None else function.parameter(bias)
    )


def _obstacle(function: Function, linear: fx.Node) -> str | None:
    if decoded(linear.args[1]) is None:
        return "its weights are not in codes"
    return "its weights are computed" if matrix(function, linear) is None else None


def _stored(linear: fx.Node) -> str | None:
    """The parameter that holds the codes of a layer's weight."""
    weight = decoded(linear.args[1])
    return weight.codes.target if weight is not None and weight.codes.op == "get_attr" else None
