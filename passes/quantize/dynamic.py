"""Activations in codes whose scales are found while the model runs."""

from __future__ import annotations

from torch import fx

from tersor.ir import Program
from tersor.passes.base import Lossy, Pass, PassResult
from tersor.passes.context import Context
from tersor.passes.quantize.grid import GROUP, group_problem, group_size
from tersor.passes.quantize.places import ACTIVATION_ZERO, decoded
from tersor.passes.registry import register


@register("quantize.dynamic")
class DynamicActivations(Pass):
    """linear(x, W)  ->  linear(decode(encode(x)), W) with symmetric 8-bit scales for every token.

    Before:  %y = linear(%x, %w, @b)                              %w = dequantize(@w.codes, @w.scale, axis=0)
    After:   %s = dynamic_scale(%x, group=96);  %c = quantize(%x, %s, 128, dtype='uint8', group=96)
             %d = dequantize(%c, %s, 128, group=96);  %y = linear(%d, %w, @b)

    A token has one scale for every group of neighbouring channels: one huge number costs its group digits, not the
    token. Inputs whose channels cannot be divided into such groups have one scale per token.

    Legal when the layer's weights are in codes. Layers of one input share its codes. Needs no data.

    Source: Yao et al. 2022 (ZeroQuant), token-wise activations; their groups, there of weights, as in Dettmers et al.
    2022 (8-bit optimizers), block-wise quantization.

    Options: group (most channels that share a scale; None: all of a token's do).
    """

    group: int | None = GROUP

    numerics = Lossy()
    stage = "quantize.activations"
    acts_on = ("linear",)

    def problem(self) -> str | None:
        return group_problem(self.group)

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
                    form = {} if (group := self._group_of(x)) is None else {"group": group}
                    scale = build.dynamic_scale(x, **form)
                    codes = build.quantize(x, scale, ACTIVATION_ZERO, dtype="uint8", **form)
                    encoded[x] = build.dequantize(codes, scale, ACTIVATION_ZERO, **form)
                linear.args = (encoded[x], *linear.args[1:])
                group = encoded[x].kwargs.get("group")
                words = "a scale per token" if group is None else f"a scale per token and {group} channels"
                result.change(linear, f"input in 8 bits with {words}")
        return result

    def _group_of(self, x: fx.Node) -> int | None:
        """Channels of a value that share a scale; None where all do."""
        size = x.meta["value"].shape[-1]
        return group_size(size, self.group) if isinstance(size, int) else None
