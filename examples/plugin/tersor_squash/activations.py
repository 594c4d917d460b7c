"""Replaces GELUs by the squash operation."""

from __future__ import annotations

from tersor.ir import Program
from tersor.passes import Context, Lossy, Pass, PassResult, register


@register("tersor_squash.activations")
class SquashActivations(Pass):
    """gelu(x)  ->  squash(x, bound): another activation, for models that are trained further.

    Before:  %y = gelu(%x)
    After:   %y = tersor_squash.squash(%x, bound=3.0)

    Legal always; the results differ on purpose.

    Source: an example; not a method to recommend.
    """

    bound: float = 3.0

    numerics = Lossy()
    acts_on = ("gelu", "gelu_tanh")

    def problem(self) -> str | None:
        return None if self.bound > 0 else f"bound = {self.bound} should be positive"

    def run(self, program: Program, context: Context) -> PassResult:
        result = PassResult()
        for function, node in self.select(program):
            build = function.builder(before=node, made_by=self.name)
            result.change(node, f"{node.target.name} replaced")
            function.replace(node, build.emit("tersor_squash.squash", node.args[0], bound=self.bound))
        return result
