"""Evens out the ranges of activations and of the weights that multiply them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from tersor.passes.registry import register
from tersor.passes.smooth.engine import Candidate, Smoothing
from tersor.passes.smooth.error import Observed
from tersor.passes.smooth.places import Place

SMALLEST = 1e-5
"""Ranges below this count as this, as in the official code."""

ALPHAS = tuple(round(0.05 * i, 2) for i in range(4, 19, 2))
"""What "auto" tries: 0.2, 0.3, ... 0.9."""


@register("smooth.smoothquant")
class SmoothQuant(Smoothing):
    """x W^T  ->  (x / s) (W diag(s))^T: moves outlier channels of activations into the weights.

    Before:  %n = layer_norm(%x, @gamma, @beta);    %y = linear(%n, @w, @b)
    After:   %n = layer_norm(%x, @gamma', @beta');  %y = linear(%n, @w', @b)      gamma' = gamma / s, w' = w diag(s)

    s_j = max|x_j|^alpha / max|w_j|^(1 - alpha), over all layers that read x together. A second run finds s = 1.

    Legal at the places of `tersor.passes.smooth.places`: norms (those that the residual stream reads too get a
    multiplication there), values under attention (equal s in a group of heads), factors of products and relu; what
    other activations make gets a factor. Kept only where it lowers the held-out error of rounding.

    Source: Xiao et al. 2023 (SmoothQuant), eq. 4; the extra places as in AWQ (Lin et al. 2024).

    Options: alpha (how much of the difficulty moves; "auto": the best of 0.2 to 0.9 at each place), bits, activations,
    kinds, samples.
    """

    alpha: float | Literal["auto"] = "auto"

    def problem(self) -> str | None:
        if self.alpha != "auto" and not 0 <= self.alpha <= 1:
            return f"alpha = {self.alpha} should be 0 to 1, or 'auto'"
        return super().problem()

    def candidates(self, place: Place, observed: Observed) -> Iterator[Candidate]:
        x = observed.absmax.clamp(min=SMALLEST)
        w = place.largest(observed.weight_absmax).clamp(min=SMALLEST)
        for alpha in ALPHAS if self.alpha == "auto" else (self.alpha,):
            s = (x**alpha / w ** (1 - alpha)).clamp(min=SMALLEST)
            yield Candidate(s, None, f"alpha {alpha:g}")
