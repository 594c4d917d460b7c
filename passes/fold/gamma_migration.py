"""Moves the scale of norms behind them, also where the residual stream reads the norm."""

from __future__ import annotations

import torch

from tersor.ir import Program
from tersor.passes.base import Equivalent, Pass, PassResult
from tersor.passes.context import Context
from tersor.passes.registry import register
from tersor.passes.smooth.places import norm_place
from tersor.passes.weights import apply_changes, parameter

NEGLIGIBLE = 1e-3
"""Channels whose gamma is this small beside the largest keep it: beta / gamma would be huge, or infinite."""


@register("fold.gamma_migration")
class GammaMigration(Pass):
    """norm(x) * gamma + beta  ->  (norm(x) + beta / gamma) * gamma, the last factor in the layers that read it.

    Before:  %n = layer_norm(%x, @gamma, @beta);   %y = linear(%n, @w, @b);   %r = add(%n, %z)
    After:   %n = layer_norm(%x, @one, @beta');    %y = linear(%n, @w', @b);  %m = mul(%n, @gamma);  %r = add(%m, %z)
             beta' = beta / gamma, w' = w diag(gamma)

    What is quantized between is as even as the normalized input: large gammas are what makes outliers in it. Other
    readers than linear layers, such as the residual stream of a post-norm model, get a multiplication. Needs no data.
    In pre-norm models smoothing by data afterwards gives the same as without it.

    Legal when gamma and beta are parameters and no weight is tied to something else. Channels of negligible gamma keep
    it; negative ones move like others.

    Source: Wei et al. 2022 (Outlier Suppression), section 4.1.
    """

    numerics = Equivalent(1e-5)
    stage = "fold"
    acts_on = ("layer_norm", "rms_norm", "linear")
    forbids = {"quantized"}

    def run(self, program: Program, context: Context) -> PassResult:
        result, changes = PassResult(), []
        for function, norm in self.select(program, "layer_norm", "rms_norm"):
            place = norm_place(function, norm)
            gamma = parameter(function, norm, 1)
            if isinstance(place, str):
                result.skip(norm, place)
            elif gamma is None:
                result.skip(norm, "it has no gamma")
            else:
                gamma = gamma.double()
                moved = gamma.abs() > NEGLIGIBLE * gamma.abs().max()
                s = torch.where(moved, gamma, 1.0)
                if not (s != 1).any():
                    result.skip(norm, "its gamma is one")
                    continue
                kept = len(s) - int(moved.sum())
                words = f"gamma moved into {len(place.consumers)} linear layers"
                words += " and a multiplication" if place.kind == "residual" else ""
                words += f"; {kept} negligible channels keep it" if kept else ""
                changes.append(place.change(s, None, words))
        apply_changes(self, program, changes, result)
        return result
