"""Which places of a program stand for which in its reference."""

from __future__ import annotations

from torch import fx

from tersor.ir import Program
from tersor.passes.sites import names


def counterparts(program: Program, reference: Program, *operations: str) -> dict[fx.Node, fx.Node]:
    """The operations of these names in ``main`` that have one of the same site, operation and shape in the reference.

    Sites without a name, and names that several operations share, have none.
    """
    found = _by_name(reference, operations)
    pairs = {node: found[name] for name, node in _by_name(program, operations).items() if name in found}
    return {n: o for n, o in pairs.items() if n.target is o.target and n.meta["value"] == o.meta["value"]}


def _by_name(program: Program, operations: tuple[str, ...]) -> dict[str, fx.Node]:
    by_name: dict[str, list[fx.Node]] = {}
    for node, name in names(program).items():
        if node.graph is program.main.graph and node.target.name in operations and not name.startswith("%"):
            by_name.setdefault(name, []).append(node)
    return {name: nodes[0] for name, nodes in by_name.items() if len(nodes) == 1}
