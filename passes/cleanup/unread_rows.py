"""Computes of each value only the rows that are read."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from tersor.ir import Function, Program
from tersor.ir.matching import is_call
from tersor.ir.program import infer
from tersor.passes.base import Equivalent, Pass, PassResult
from tersor.passes.context import Context
from tersor.passes.registry import register
from tersor.passes.sites import names

Operands = dict[int, int]
"""Positions of the operands that a slice of the result needs a slice of, each with the dimension to cut."""


@register("cleanup.unread_rows")
class RemoveUnreadRows(Pass):
    """f(x)[:, a:b]  ->  f(x[:, a:b]): a classifier that reads one token needs one row of its last layer.

    Before:  %y = gelu(linear(%x, @w));  %z = slice(%y, dim=1, start=0, end=1)
    After:   %s = slice(%x, dim=1, start=0, end=1);  %z = gelu(linear(%s, @w))

    Legal where nothing else reads the value, and each of its rows depends on the same row of its operands alone:
    behind element-wise operations, linear layers, norms, and attention, whose queries are cut while keys and values
    stay whole. Queries of causal or windowed attention are counted from the end, so only slices up to the last one
    pass. The last pass of a pipeline: others look for layers that read whole values.

    Source: pushing selections towards the data, as query planners do (Smith and Chang 1975).
    """

    numerics = Equivalent(1e-5)

    def run(self, program: Program, context: Context) -> PassResult:
        result, named = PassResult(), names(program)
        spared = self.unselected(program)
        for function in program.functions.values():
            pending = function.calls("slice")
            while pending:
                cut = pending.pop()
                if cut._erased:
                    continue
                node = cut.args[0]
                if node in spared or (operands := _cut_operands(cut)) is None:
                    continue
                pending += self._move(function, cut, operands)
                if node in named:
                    result.change(named[node], "only the rows that are read")
        return result

    def _move(self, function: Function, cut: fx.Node, operands: Operands) -> list[fx.Node]:
        """Puts slices behind the operands of the node that ``cut`` slices, instead of all behind it; returns them."""
        node, cuts = cut.args[0], []
        same = [user for user in node.users if _same(cut, user)]
        if len(same) < len(node.users):
            made = function.builder(before=node).emit(node.target, *node.args, **node.kwargs)
            for user in same:
                user.update_arg(0, made)
            node = made
        for position, dim in operands.items():
            operand = node.args[position]
            behind = operand.next
            while behind.op == "placeholder":  # inputs stay together
                behind = behind.next
            build = function.builder(before=behind, like=cut, made_by=self.name)
            made = build.emit("slice", operand, **{**cut.kwargs, "dim": dim})
            for other in [user for user in operand.users if user is not made and _same(made, user)]:
                function.replace(other, made)
            node.update_arg(position, made)
            cuts.append(made)
        node.meta["value"] = infer(node.target, node.args, node.kwargs)
        for user in same:
            function.replace(user, node)
        return cuts


def _cut_operands(cut: fx.Node) -> Operands | None:
    """What must be cut before the value that ``cut`` slices is computed; None where it must be computed whole."""
    node, part = cut.args[0], cut.meta["value"]
    if node.op != "call_function":
        return None
    if not all(_same(cut, user) for user in node.users) and not is_call(node, *_REPEATED):
        return None
    whole = node.meta["value"]
    dim = cut.kwargs["dim"] % whole.rank
    rule = _RULES.get(node.target.name, _elementwise if node.target.elementwise else None)
    if rule is None or part.shape[dim] == whole.shape[dim]:
        return None
    return rule(node, dim, cut)


_REPEATED = {"cast"}
"""What is done again for the rows that are read: layers look for a cast right before them, and it is cheap."""


def _same(cut: fx.Node, user: fx.Node) -> bool:
    """Whether a user of the value that ``cut`` slices reads that slice of it, too."""
    return is_call(user, "slice") and user.kwargs == cut.kwargs


def _elementwise(node: fx.Node, dim: int, cut: fx.Node) -> Operands:
    """Operands that are repeated along the dimension stay as they are."""
    whole, found = node.meta["value"], {}
    for position, operand in enumerate(node.args):
        if not isinstance(operand, fx.Node):
            continue
        value = operand.meta["value"]
        at = dim - whole.rank + value.rank
        if at >= 0 and value.shape[at] != 1:
            found[position] = at
    return found


def _rowwise(node: fx.Node, dim: int, cut: fx.Node) -> Operands | None:
    """Operations along the last dimension of their first operand."""
    return {0: dim} if dim < node.meta["value"].rank - 1 else None


def _grouped(node: fx.Node, dim: int, cut: fx.Node) -> Operands | None:
    """Codes and scales of the same rows."""
    return {0: dim, 2: dim} if dim < node.meta["value"].rank - 1 else None


def _softmax(node: fx.Node, dim: int, cut: fx.Node) -> Operands | None:
    return {0: dim} if dim != node.kwargs["dim"] % node.meta["value"].rank else None


def _attention(node: fx.Node, dim: int, cut: fx.Node) -> Operands | None:
    """Rows of queries, with those of a mask that has them."""
    if dim != 1:
        return None
    queries = node.args[0].meta["value"].shape[1]
    end, step = cut.kwargs.get("end"), cut.kwargs.get("step", 1)
    to_the_last = step == 1 and (end is None or end == queries)
    if (node.kwargs.get("causal") or node.kwargs.get("window") is not None) and not to_the_last:
        return None
    at = node.target.operands.index("mask")
    mask = node.args[at] if len(node.args) > at else None
    own_rows = mask is not None and mask.meta["value"].shape[2] != 1
    return {0: 1, at: 2} if own_rows else {0: 1}


_RULES: dict[str, Callable[[fx.Node, int, fx.Node], Operands | None]] = {
    "linear": _rowwise,
    "integer_linear": _rowwise,
    "grouped_integer_linear": _grouped,
    "layer_norm": _rowwise,
    "rms_norm": _rowwise,
    "dynamic_scale": _rowwise,
    "softmax": _softmax,
    "attention": _attention,
    "integer_attention": _attention,
}
