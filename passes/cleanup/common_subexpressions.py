"""Computes once what is computed twice."""

from __future__ import annotations

from tersor.ir import Program
from tersor.ir.canonicalize.cleanup import merge_duplicates
from tersor.passes.base import Exact, Pass, PassResult
from tersor.passes.context import Context
from tersor.passes.registry import register
from tersor.passes.sites import names


@register("cleanup.common_subexpressions")
class MergeCommonSubexpressions(Pass):
    """Of equal operations on equal operands the first stays, and all users read it.

    Before:  %a = exp(%x);  %b = exp(%x);  %c = add(%a, %b)
    After:   %a = exp(%x);  %c = add(%a, %a)

    Always legal: operations have no side effects and no hidden state.

    Source: any compiler text book.
    """

    numerics = Exact()

    def run(self, program: Program, context: Context) -> PassResult:
        result, named, spared = PassResult(), names(program), self.unselected(program)
        for function in program.functions.values():
            merge_duplicates(function, spared)
        for node, name in named.items():
            if node._erased:
                result.change(name, "the same value was there already")
        return result
