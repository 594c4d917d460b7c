"""Sites as passes and reports speak of them (see `tersor.ir.site`)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from tersor.ir import Program
from tersor.ir.site import sites


def site_of(place: fx.Node | str) -> str:
    """The name that a node was given at capture; a node without one goes by ``%name``."""
    return place if isinstance(place, str) else place.meta.get("site") or f"%{place.name}"


def in_words(node: fx.Node) -> str:
    """A node in the words of a reason: its site and operation, or only the operation where it has no site."""
    if node.op == "output":
        return "the program's output"
    kind = node.target.name if node.op == "call_function" else node.op
    return f"{node.meta['site']} ({kind})" if node.meta.get("site") else kind


def names(program: Program) -> dict[fx.Node, str]:
    """The name of every operation node: given at capture, else found from the graph, else ``%name``."""
    found = {site.node: site.name for site in sites(program)}
    return {
        node: found.get(node) or site_of(node) for _, node in program.nodes() if node.op == "call_function"
    }


def shares(amounts: Mapping[str, float]) -> dict[str, float]:
    """Each site's part of what all have together."""
    total = sum(amounts.values())
    return {site: amount / total for site, amount in amounts.items()}


def places(program: Program) -> set[tuple[str, str]]:
    """Function and site of every operation node."""
    functions = {function.graph: name for name, function in program.functions.items()}
    return {(functions[node.graph], site) for node, site in names(program).items()}
