"""Turns a grid per channel into one for all channels."""

from __future__ import annotations

from collections.abc import Iterator

from tersor.passes.quantize.grid import Grid
from tersor.passes.registry import register
from tersor.passes.smooth.engine import Candidate, Smoothing
from tersor.passes.smooth.error import Observed
from tersor.passes.smooth.places import Place


@register("smooth.repq")
class RepQ(Smoothing):
    """x W^T + b  ->  ((x - z) / s) (W diag(s))^T + (b + W z): rounding x per channel becomes rounding it per tensor.

    Before:  %n = layer_norm(%x, @gamma, @beta);    %y = linear(%n, @w, @b)
    After:   %n = layer_norm(%x, @gamma', @beta');  %y = linear(%n, @w', @b')
             gamma' = gamma / s, beta' = (beta - z) / s, w' = w diag(s), b' = b + w z

    With scales S_j and zero points Z_j of a grid for each channel, and s~ and z~ their means: s = S / s~ and
    z = S (z~ - Z), so that the codes of x under the grids per channel are those of the new x under (s~, z~).

    Legal at the places of `tersor.passes.smooth.places`; where no shift is, the grids are symmetric. Kept only where it
    lowers the held-out error of rounding.

    Source: Li et al. 2023 (RepQ-ViT), eq. 7 to 11.

    Options: bits, activations, kinds, samples.
    """

    def candidates(self, place: Place, observed: Observed) -> Iterator[Candidate]:
        grid = Grid(self.bits, symmetric=not place.shiftable)
        reach = observed.absmax.max()
        # a channel that hardly moves would take a huge factor into its weights
        low, high = observed.low.clamp(max=-reach * 1e-4), observed.high.clamp(min=reach * 1e-4)
        scale, zero = grid.fit(low, high)
        z = scale * (zero.mean().round() - zero) if place.shiftable else None
        yield Candidate(scale / scale.mean(), z, "a grid per channel")
