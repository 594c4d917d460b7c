"""Moves the scale of norms into the linear layers that follow."""

from __future__ import annotations

import torch

from tersor.ir import Function, Program
from tersor.passes.base import Equivalent, Pass, PassResult
from tersor.passes.context import Context
from tersor.passes.fold.norms import absorbing_linears
from tersor.passes.registry import register
from tersor.passes.weights import Derivation, WeightChange, apply_changes, operand, parameter


@register("fold.norm_gamma")
class FoldNormGamma(Pass):
    """(norm(x) * gamma) W  ->  norm(x) (diag(gamma) W).

    Before:  %n = rms_norm(%x, @gamma);  %y = linear(%n, @w)
    After:   %n = rms_norm(%x);          %y = linear(%n, @w')      column i of w' is gamma_i times column i of w

    It saves next to nothing by itself; methods that compare columns of the weights (pruning, smoothing, low rank)
    need it. Legal when all users of the norm are linear layers that read it as their input, the norm has no beta
    (`fold.norm_beta` moves it first), and no weight is tied to something else, such as an embedding.

    Source: affine maps compose; Outlier Suppression (Wei et al. 2022, section 4.1) calls it gamma migration.
    """

    numerics = Equivalent(1e-5)
    stage = "fold"
    acts_on = ("layer_norm", "rms_norm", "linear")
    forbids = {"quantized"}

    def run(self, program: Program, context: Context) -> PassResult:
        result, changes = PassResult(), []
        for function, norm in self.select(program, "layer_norm", "rms_norm"):
            gamma = parameter(function, norm, 1)
            linears = absorbing_linears(function, norm)
            if gamma is None:
                absent = operand(norm, 1) is None
                result.skip(norm, "it has no gamma" if absent else "its gamma is computed, not a parameter")
            elif operand(norm, 2) is not None:
                result.skip(norm, "it has a beta: fold.norm_beta has to move it first")
            elif isinstance(linears, str):
                result.skip(norm, linears)
            else:
                changes.append(self._change(function, norm, linears, gamma))
        apply_changes(self, program, changes, result)
        return result

    @staticmethod
    def _change(function: Function, norm, linears: list, gamma: torch.Tensor) -> WeightChange:
        change = WeightChange(function, norm, f"gamma moved into {len(linears)} linear layers")
        change.dropped.add((norm, 1))
        scale = Derivation(
            ("scale columns", norm.args[1].target), lambda weight: weight.double() * gamma.double()
        )
        for linear in linears:
            change.derived[linear, 1] = scale
        return change
