"""Products and tables of bf16 numbers: half the bytes, and twice the speed where the hardware multiplies them."""

from __future__ import annotations

from typing import Literal

from tersor.ir import Program
from tersor.passes.base import Lossy, Pass, PassResult
from tersor.passes.context import Context
from tersor.passes.quantize.narrow import Narrowing
from tersor.passes.registry import register


@register("quantize.bf16")
class BFloat16(Pass):
    """x W^T  ->  bf16(x) bf16(W)^T, with sums in float32; likewise both products of attention. T[i]  ->  bf16(T)[i].

    Before:  %y = linear(%x, @w, @b);                %a = attention(%q, %k, %v, ...);  %e = embedding(%ids, @t)
    After:   %n = cast(%x, bfloat16);  %y = linear(cast(%n, float32), cast(@w.bf16, float32), @b)
             %a = attention(%q, %k, %v, products='bfloat16', ...);  %e = cast(embedding(%ids, @t.bf16), float32)

    A product of two bf16 numbers is exact in float32, so what the program says is what the hardware computes. Legal
    when the weight is a float32 parameter that only linear layers read, or the table one that only embeddings read;
    small tables stay as they are. Layers of one input share its rounded form.

    Source: Kalamkar et al. 2019, A Study of BFLOAT16 for Deep Learning Training.

    Options: kinds ("linear", "attention", "embedding": the operations to work on).
    """

    kinds: tuple[Literal["linear", "attention", "embedding"], ...] = ("linear", "attention", "embedding")

    numerics = Lossy()
    stage = "quantize.activations"
    acts_on = ("linear", "attention", "embedding")

    def run(self, program: Program, context: Context) -> PassResult:
        result, narrowing = PassResult(), Narrowing(program, "bfloat16", "bf16", self.name)
        for function, node in self.select(program):
            if node.target.name not in self.kinds:
                result.skip(node, f"kinds leaves {node.target.name} out")
            else:
                narrowing.apply(function, node, result)
        narrowing.finish()
        return result
