"""Moves the biases of value projections behind the attention."""

from __future__ import annotations

from tersor.ir import Program
from tersor.passes.base import Equivalent, Pass, PassResult
from tersor.passes.context import Context
from tersor.passes.fold.attentions import (
    VALUE,
    bias_of,
    every_query_sees_a_key,
    head_sizes,
    output_projection,
    projection,
)
from tersor.passes.registry import register
from tersor.passes.weights import WeightChange, apply_changes, parameter


@register("fold.value_bias")
class FoldValueBias(Pass):
    """softmax(s) (v + b) W + c  ->  softmax(s) v W + (c + b W): the rows of a softmax sum to one.

    Before:  %v = linear(%x, @w, @b);  %a = attention(%q, %k, %v);  %y = linear(%a, @o, @c)
    After:   %v = linear(%x, @w);      %a = attention(%q, %k, %v);  %y = linear(%a, @o, @c')      c' = c + o b

    With grouped queries b is repeated for each head of its group. Legal when the attention alone reads the values, a
    linear layer alone reads the attention, and every query sees a key: under a causal and a padding mask together a
    query may see none, its attention is zero, and the bias must not reach it.

    Source: rows of a softmax sum to one; used by AWQ and OS+ to move shifts through attention.
    """

    numerics = Equivalent(1e-5)
    stage = "fold"
    acts_on = ("attention", "linear")
    forbids = {"quantized"}

    def run(self, program: Program, context: Context) -> PassResult:
        result, changes = PassResult(), []
        for function, attention in self.select(program, "attention"):
            value, out = projection(function, attention, VALUE), output_projection(function, attention)
            if isinstance(value, str) or isinstance(out, str):
                result.skip(attention, value if isinstance(value, str) else out)
            elif (bias := bias_of(function, value.linear)) is None:
                result.skip(attention, "the value projection has no bias")
            elif value.between:
                result.skip(
                    attention,
                    f"between the value projection and the attention lies {value.between[0].target.name}",
                )
            elif not every_query_sees_a_key(attention):
                result.skip(
                    attention, "its mask may hide every key from a query, whose result must not get the bias"
                )
            else:
                heads, kv_heads = attention.kwargs["heads"], attention.kwargs["kv_heads"]
                per_head = bias.double().reshape(kv_heads, head_sizes(attention)[1])
                merged = per_head.repeat_interleave(heads // kv_heads, 0).reshape(-1)
                change = WeightChange(function, attention, "value bias moved into the output projection")
                change.dropped.add((value.linear, 2))
                change.add_bias(out, parameter(function, out, 1).double() @ merged)
                changes.append(change)
        apply_changes(self, program, changes, result)
        return result
