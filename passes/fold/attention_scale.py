"""Moves the scale of attention into the query projection."""

from __future__ import annotations

from tersor.ir import Program
from tersor.passes.base import Equivalent, Pass, PassResult
from tersor.passes.context import Context
from tersor.passes.fold.attentions import QUERY, bias_of, projection
from tersor.passes.registry import register
from tersor.passes.weights import Derivation, WeightChange, apply_changes


@register("fold.attention_scale")
class FoldAttentionScale(Pass):
    """softmax(s (x W + b) k^T)  ->  softmax((x (s W) + s b) k^T).

    Before:  %q = linear(%x, @w, @b);    %a = attention(%q, %k, %v, scale=0.125)
    After:   %q = linear(%x, @w', @b');  %a = attention(%q, %k, %v, scale=1.0)      w' = 0.125 w, b' = 0.125 b

    Legal when the attention alone reads the queries; a rotary embedding between is linear and does not mind, a norm
    does.

    Source: the product is linear in the queries.
    """

    numerics = Equivalent(1e-5)
    stage = "fold"
    acts_on = ("attention", "linear")
    forbids = {"quantized"}

    def run(self, program: Program, context: Context) -> PassResult:
        result, changes = PassResult(), []
        for function, attention in self.select(program, "attention"):
            scale, query = attention.kwargs["scale"], projection(function, attention, QUERY)
            if scale == 1.0:
                result.skip(attention, "its scale is 1")
            elif isinstance(query, str):
                result.skip(attention, query)
            elif query.has("rms_norm", "layer_norm"):
                result.skip(
                    attention,
                    "between the query projection and the attention lies a norm, which undoes a scale",
                )
            else:
                change = WeightChange(
                    function, attention, f"scale {scale:.6g} moved into the query projection"
                )
                times = Derivation(("scale", scale), lambda tensor, scale=scale: tensor.double() * scale)
                change.derived[query.linear, 1] = times
                if bias_of(function, query.linear) is not None:
                    change.derived[query.linear, 2] = times
                change.attributes[attention] = {"scale": 1.0}
                changes.append(change)
        apply_changes(self, program, changes, result)
        return result
