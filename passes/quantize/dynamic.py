"""Activations in codes whose scales are found while the model runs."""

from __future__ import annotations

from torch import fx

from tersor.ir import Program
from tersor.passes.base import Lossy, Pass, PassResult
from tersor.passes.context import Context
from tersor.passes.quantize.places import ACTIVATION_ZERO, decoded
from tersor.passes.registry import register


@register("quantize.dynamic")
class DynamicActivations(Pass):
    """linear(x, W)  ->  linear(decode(encode(x)), W) with a symmetric 8-bit scale for every token.

    Before:  %y = linear(%x, %w, @b)                              %w = dequantize(@w.codes, @w.scale, axis=0)
    After:   %s = dynamic_scale(%x);  %c = quantize(%x, %s, 128, dtype='uint8')
             %d = dequantize(%c, %s, 128);  %y = linear(%d, %w, @b)

    Legal when the layer's weights are in codes. Layers of one input share its codes. Needs no data.

    Source: Yao et al. 2022 (ZeroQuant), token-wise activations.
    """

    numerics = Lossy()
    stage = "quantize.activations"
    acts_on = ("linear",)

    def run(self, program: Program, context: Context) -> PassResult:
        result = PassResult()
        encoded: dict[fx.Node, fx.Node] = {}
        for function, linear in self.select(program):
            x = linear.args[0]
            if decoded(x):
                result.skip(linear, "its input is in codes already")
            elif not decoded(linear.args[1]):
                result.skip(linear, "its weights are not in codes")
            else:
                if x not in encoded:
                    build = function.builder(before=linear, made_by=self.name)
                    scale = build.dynamic_scale(x)
                    codes = build.quantize(x, scale, ACTIVATION_ZERO, dtype="uint8")
                    encoded[x] = build.dequantize(codes, scale, ACTIVATION_ZERO)
                linear.args = (encoded[x], *linear.args[1:])
                result.change(linear, "input in 8 bits with a scale per token")
        return result
