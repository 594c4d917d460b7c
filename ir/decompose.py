"""Operations taken apart by their own decompositions."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from tersor.ir.program import Function


def decompose(function: Function, keep: Callable[[fx.Node], bool]) -> list[fx.Node]:
    """Decomposes every operation that ``keep`` does not accept, as far as decompositions reach.

    Returns the operations that this made.
    """
    return [made for node in function.calls() for made in _decompose(function, node, keep)]


def _decompose(function: Function, node: fx.Node, keep: Callable[[fx.Node], bool]) -> list[fx.Node]:
    op = node.target
    if op.decompose is None or keep(node):
        return []
    before = set(function.graph.nodes)
    result = op.decompose(function.builder(before=node), *node.args, **node.kwargs)
    made = [n for n in function.graph.nodes if n not in before and n.op == "call_function"]
    function.replace(node, result)
    return [*made, *(inner for outer in made for inner in _decompose(function, outer, keep))]
