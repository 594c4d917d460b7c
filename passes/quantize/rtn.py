"""Weights in codes, each rounded to the nearest."""

from __future__ import annotations

from tersor.passes.quantize.weights import Rounding
from tersor.passes.registry import register


@register("quantize.rtn")
class RoundToNearest(Rounding):
    """x W^T  ->  x (s C)^T with 8-bit codes C = round(W / s) and a scale per row (or group) of W.

    Before:  %y = linear(%x, @w, @b)
    After:   %w = dequantize(@w.codes, @w.scale, axis=0);  %y = linear(%x, %w, @b)

    Legal when the weight is a float32 parameter that only linear layers read (an embedding that is tied to the output
    projection stays wide).

    Source: Jacob et al. 2018; per row as in Krishnamoorthi 2018; per group as in Yao et al. 2022 (ZeroQuant).

    Options: bits (2 to 8), group (consecutive inputs that share a scale; None: one scale per row), clip (scales of
    least rounding error).
    """
