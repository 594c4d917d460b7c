"""Drops the biases of key projections."""

from __future__ import annotations

from tersor.ir import Program
from tersor.passes.base import Equivalent, Pass, PassResult
from tersor.passes.context import Context
from tersor.passes.fold.attentions import KEY, bias_of, projection
from tersor.passes.registry import register
from tersor.passes.weights import WeightChange, apply_changes


@register("fold.key_bias")
class FoldKeyBias(Pass):
    """softmax(q (k + b)^T)  ->  softmax(q k^T): q b is the same for all keys of a query, and softmax does not see it.

    Before:  %k = linear(%x, @w, @b);  %a = attention(%q, %k, %v)
    After:   %k = linear(%x, @w);      %a = attention(%q, %k, %v)

    Legal when the attention alone reads the keys and nothing lies between: a rotary embedding turns the bias by the
    key's position, a norm mixes it with the channels.

    Source: Kobayashi et al. 2020 and others; softmax is invariant to a shift.
    """

    numerics = Equivalent(1e-5)
    stage = "fold"
    acts_on = ("attention", "linear")
    forbids = {"quantized"}

    def run(self, program: Program, context: Context) -> PassResult:
        result, changes = PassResult(), []
        for function, attention in self.select(program, "attention"):
            key = projection(function, attention, KEY)
            if isinstance(key, str):
                result.skip(attention, key)
            elif bias_of(function, key.linear) is None:
                result.skip(attention, "the key projection has no bias")
            elif key.between:
                kinds = ", ".join(node.target.name for node in key.between)
                result.skip(attention, f"between the key projection and the attention lies {kinds}")
            else:
                change = WeightChange(function, attention, "key bias dropped")
                change.dropped.add((key.linear, 2))
                changes.append(change)
        apply_changes(self, program, changes, result)
        return result
