"""Moves the shift of layer norms into the biases of the linear layers that follow."""

from __future__ import annotations

from tersor.ir import Program
from tersor.passes.base import Equivalent, Pass, PassResult
from tersor.passes.context import Context
from tersor.passes.fold.norms import absorbing_linears
from tersor.passes.registry import register
from tersor.passes.weights import WeightChange, apply_changes, operand, parameter


@register("fold.norm_beta")
class FoldNormBeta(Pass):
    """(norm(x) + beta) W + b  ->  norm(x) W + (b + beta W).

    Before:  %n = layer_norm(%x, @gamma, @beta);  %y = linear(%n, @w, @b)
    After:   %n = layer_norm(%x, @gamma);         %y = linear(%n, @w, @b')      b' = b + w beta

    Legal when all users of the norm are linear layers that read it as their input. Post-norm models also add the
    norm's result to the residual stream, so nothing happens there. Not done where linear layers would get new biases
    that are larger than beta (a head over a vocabulary).

    Source: affine maps compose; used by every post-training quantizer that clears layer norms of their shift.
    """

    numerics = Equivalent(1e-5)
    stage = "fold"
    acts_on = ("layer_norm", "linear")
    forbids = {"quantized"}

    def run(self, program: Program, context: Context) -> PassResult:
        result, changes = PassResult(), []
        for function, norm in self.select(program, "layer_norm"):
            beta = parameter(function, norm, 2)
            if beta is None:
                absent = operand(norm, 2) is None
                result.skip(norm, "it has no beta" if absent else "its beta is computed, not a parameter")
                continue
            linears = absorbing_linears(function, norm)
            if isinstance(linears, str):
                result.skip(norm, linears)
                continue
            change = WeightChange(function, norm, f"beta moved into {len(linears)} linear layers")
            change.dropped.add((norm, 2))
            for linear in linears:
                change.add_bias(linear, parameter(function, linear, 1).double() @ beta.double())
            if sum(len(bias) for _, bias in change.created.values()) > len(beta):
                result.skip(
                    norm, "the linear layers have no bias, and new ones would be larger than its beta"
                )
            else:
                changes.append(change)
        apply_changes(self, program, changes, result)
        return result
