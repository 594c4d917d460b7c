"""Products of fp16 numbers: half the bytes, and on ARM cores with fp16 arithmetic twice the speed."""

from __future__ import annotations

from tersor.ir import Program
from tersor.passes.base import Lossy, Pass, PassResult
from tersor.passes.context import Context
from tersor.passes.quantize.narrow import Narrowing
from tersor.passes.registry import register


@register("quantize.fp16")
class Float16(Pass):
    """x W^T  ->  fp16(x) fp16(W)^T, with sums in float32; likewise both products of attention. T[i]  ->  fp16(T)[i].

    Before:  %y = linear(%x, @w, @b);  %a = attention(%q, %k, %v, ...);  %e = embedding(%ids, @t)
    After:   %n = cast(minimum(maximum(%x, -65504), 65504), float16)
             %y = linear(cast(%n, float32), cast(@w.fp16, float32), @b);  %e = cast(embedding(%ids, @t.fp16), float32)
             %a = attention(%q, %k, %v, products='float16', ...)

    Legal when the weight is a float32 parameter that only linear layers read (a table: only embeddings; small ones stay
    as they are), and of fp16's range: a layer with weights beyond 65504 is left alone. Inputs beyond it are limited to
    it, as one of them would make a token infinite, and so are q (times the scale of the scores), k and v. Layers of one
    input share its rounded form. The softmax stays in float32.

    Code for ARM cores with fp16 arithmetic adds up to 64 products in fp16, and those sums in float32. That rounds by
    about 1.2e-3 of the result's norm, operands in fp16 by 3e-4 and in bf16 by 2.3e-3 (normal random numbers). A sum of
    64 products beyond 65504 becomes infinite there. On other targets weights are widened as they are read: products and
    sums are float32, and attention rounds nothing.

    Source: Micikevicius et al. 2018, Mixed Precision Training (fp16 operands, float32 sums).
    """

    numerics = Lossy()
    stage = "quantize.activations"
    acts_on = ("linear", "attention", "embedding")

    def run(self, program: Program, context: Context) -> PassResult:
        result, narrowing = PassResult(), Narrowing(program, "float16", "fp16", self.name)
        for function, node in self.select(program):
            narrowing.apply(function, node, result)
        narrowing.finish()
        return result
