"""Removes what no result depends on."""

from __future__ import annotations

from tersor.ir import Program
from tersor.ir.canonicalize.cleanup import remove_dead
from tersor.passes.base import Exact, Pass, PassResult
from tersor.passes.context import Context
from tersor.passes.registry import register
from tersor.passes.sites import names


@register("cleanup.dead_code")
class RemoveDeadCode(Pass):
    """Operations that no result depends on disappear, with the parameters that only they read.

    Before:  %a = gelu(%x);  %b = exp(%x);  return %a
    After:   %a = gelu(%x);  return %a

    Always legal: operations have no side effects. Inputs stay, read or not.

    Source: any compiler text book.
    """

    numerics = Exact()

    def run(self, program: Program, context: Context) -> PassResult:
        result, named, spared = PassResult(), names(program), self.unselected(program)
        for function in program.functions.values():
            remove_dead(function, spared)
        for node, name in named.items():
            if node._erased:
                result.change(name, "no result depended on it")
        return result
