"""Computes at compile time what depends on no input."""

from __future__ import annotations

from tersor.ir import Program
from tersor.ir.canonicalize.constants import fold_constants
from tersor.passes.base import Exact, Pass, PassResult
from tersor.passes.context import Context
from tersor.passes.registry import register
from tersor.passes.sites import names


@register("cleanup.constant_folding")
class FoldConstants(Pass):
    """A value that depends on parameters and numbers alone becomes a parameter.

    Before:  %w = permute(@w, dims=(1, 0));  %y = linear(%x, %w)
    After:   %y = linear(%x, @w')

    Legal always; done where the new parameter is small or no larger than those that it makes unused. What grows with
    one dynamic dimension becomes a table for the largest size and a slice of it.

    Source: any compiler text book.
    """

    numerics = Exact()

    def run(self, program: Program, context: Context) -> PassResult:
        result, named, spared = PassResult(), names(program), self.unselected(program)
        for function in program.functions.values():
            for note in fold_constants(function, spared):
                place, _, reason = note.partition(" ")
                result.skip(place, f"it {reason}")
        for node, name in named.items():
            if node._erased:
                result.change(name, "computed once and stored")
        return result
