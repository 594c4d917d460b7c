"""Products of bf16 numbers: half the bytes and twice the speed where the hardware multiplies them."""

from __future__ import annotations

from typing import Literal

import torch
from torch import fx

from tersor.ir import Function, Program
from tersor.passes.base import Lossy, Pass, PassResult
from tersor.passes.context import Context
from tersor.passes.quantize.places import Readers, plain_weight, readers
from tersor.passes.registry import register


@register("quantize.bf16")
class BFloat16(Pass):
    """x W^T  ->  bf16(x) bf16(W)^T, with sums in float32; likewise both products of attention.

    Before:  %y = linear(%x, @w, @b);                %a = attention(%q, %k, %v, ...)
    After:   %n = cast(%x, bfloat16);  %y = linear(cast(%n, float32), cast(@w.bf16, float32), @b)
             %a = attention(%q, %k, %v, products='bfloat16', ...)

    A product of two bf16 numbers is exact in float32, so what the program says is what the hardware computes. Legal
    when the weight is a float32 parameter that only linear layers read. Layers of one input share its rounded form.

    Source: Kalamkar et al. 2019, A Study of BFLOAT16 for Deep Learning Training.

    Options: kinds ("linear", "attention": the operations to work on).
    """

    kinds: tuple[Literal["linear", "attention"], ...] = ("linear", "attention")

    numerics = Lossy()
    stage = "quantize.activations"
    acts_on = ("linear", "attention")

    def run(self, program: Program, context: Context) -> PassResult:
        result, read_by = PassResult(), readers(program)
        rounded: dict[fx.Node, fx.Node] = {}
        stored: dict[str, str] = {}
        for function, node in self.select(program):
            if node.target.name not in self.kinds:
                result.skip(node, f"kinds leaves {node.target.name} out")
            elif node.target.name == "attention":
                if node.kwargs.get("products", "float32") == "bfloat16":
                    result.skip(node, "its products are in bf16 already")
                else:
                    node.kwargs = {**node.kwargs, "products": "bfloat16"}
                    result.change(node, "products in bf16")
            elif reason := self._narrow(function, node, read_by, rounded, stored):
                result.skip(node, reason)
            else:
                size = node.args[1].meta["value"].bytes
                result.change(node, "weights and input in bf16", bytes_before=size, bytes_after=size // 2)
        for function in program.functions.values():
            function.erase_dead(*function.graph.find_nodes(op="get_attr"))
        program.drop_unused_parameters()
        return result

    def _narrow(
        self, function: Function, linear: fx.Node, read_by: Readers,
        rounded: dict[fx.Node, fx.Node], stored: dict[str, str],
    ) -> str | None:  # fmt: skip
        """Rounds a layer's operands; returns why it does not."""
        weight = plain_weight(function, linear, read_by)
        if isinstance(weight, str):
            return weight
        x, name = linear.args[0], linear.args[1].target
        build = function.builder(before=linear, made_by=self.name)
        if name not in stored:
            stored[name] = function.parameters.add(f"{name}.bf16", weight.to(torch.bfloat16))
        if x not in rounded:
            rounded[x] = build.cast(build.cast(x, dtype="bfloat16"), dtype="float32")
        wide = build.cast(build.read(stored[name]), dtype="float32")
        linear.args = (rounded[x], wide, *linear.args[2:])
        return None
