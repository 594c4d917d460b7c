"""Centres the channels of activations and shrinks the widest."""

from __future__ import annotations

from collections.abc import Iterator

from tersor.passes.registry import register
from tersor.passes.smooth.engine import Candidate, Smoothing
from tersor.passes.smooth.error import Observed
from tersor.passes.smooth.places import Place

SMALLEST_SHARE = 1 / 128
"""The lowest threshold that is tried, relative to the widest channel. (The official search ends at an absolute 1.0 and
so does nothing where activations are small.)"""


@register("smooth.outlier_suppression_plus")
class OutlierSuppressionPlus(Smoothing):
    """x W^T + b  ->  ((x - z) / s) (W diag(s))^T + (b + W z): centred channels, none wider than a threshold.

    Before:  %n = layer_norm(%x, @gamma, @beta);    %y = linear(%n, @w, @b)
    After:   %n = layer_norm(%x, @gamma', @beta');  %y = linear(%n, @w', @b')
             gamma' = gamma / s, beta' = (beta - z) / s, w' = w diag(s), b' = b + w z

    z_j = (max x_j + min x_j) / 2 or 0, s_j = max(1, max|x_j - z_j| / t), for the threshold t and the choice of z with
    the least error of the layers that read x.

    Legal at the places of `tersor.passes.smooth.places`; shifts only at layer norms and under attentions in which
    every query sees a key. Kept only where it lowers the held-out error of rounding.

    Source: Wei et al. 2023 (Outlier Suppression+), eq. 4, 7 and 8.

    Options: steps (thresholds to try), bits, activations, kinds, samples.
    """

    steps: int = 12

    def problem(self) -> str | None:
        return f"steps = {self.steps} should be positive" if self.steps < 1 else super().problem()

    def candidates(self, place: Place, observed: Observed) -> Iterator[Candidate]:
        shifts = [("", None)]
        if place.shiftable:
            shifts.append(("shifted, ", (observed.high + observed.low) / 2))
        for words, z in shifts:
            reach = observed.absmax if z is None else (observed.high - observed.low) / 2
            widest = reach.max()
            for step in range(self.steps):
                share = SMALLEST_SHARE ** (step / self.steps)
                s = (reach / (widest * share)).clamp(min=1.0)
                yield Candidate(s, z, f"{words}threshold {share:.2g} of the widest channel")
