"""State in place: which nodes of a function may write into the memory of a state."""

from __future__ import annotations

from torch import fx

from tersor.ir.program import Function, is_state

_SAME_MEMORY = {"reshape", "cache_update"}


def in_place(function: Function) -> dict[fx.Node, str]:
    """The nodes that are a state on its way to its next value, with its name: the state, ``cache_update``s of it and
    reshapes between, where the next value is made of nothing else.

    They can share the state's memory, as long as nothing reads an earlier one of them after a later one is written.
    """
    found: dict[fx.Node, str] = {}
    for name, new in function.updates.items():
        chain, node = [new], new
        while node.op == "call_function" and node.target.name in _SAME_MEMORY:
            node = node.args[0]
            chain.append(node)
        if is_state(node) and node.target == name:
            found |= dict.fromkeys(chain, name)
    return found
