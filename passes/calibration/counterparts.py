"""The same places of one model in several functions: a decoder's prefill and its step have the same layers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Set

from torch import fx

from tersor.ir import Function

Sites = Set[tuple[str, str]]
"""Operations and the names of their sites."""


class Counterparts:
    """The values of one function, ``main``, that belong to those of others of the program.

    An operation has its counterpart at the site of the same name; where there is none, where the same is done to the
    counterparts of its operands. Inputs, states and matrices go by name, vectors and numbers, which passes add to each
    function, by content. Sizes may differ. Where several fit, there is no counterpart.
    """

    def __init__(self, main: Function):
        self._main = main
        self._found: dict[str, dict[fx.Node, fx.Node]] = {}

    def of(self, function: Function, node: fx.Node) -> fx.Node | None:
        """The node of ``main`` that a node of another function corresponds to."""
        if function.name not in self._found:
            shared = _sites(self._main) & _sites(function)
            there = _places(self._main, shared)
            here = _places(function, shared)
            self._found[function.name] = {here[key]: there[key] for key in here.keys() & there.keys()}
        return self._found[function.name].get(node)


def _sites(function: Function) -> Sites:
    return {(node.target.name, node.meta["site"]) for node in function.calls() if node.meta.get("site")}


def _places(function: Function, shared: Sites) -> dict[Hashable, fx.Node]:
    """Nodes by what says where in the model they are: a shared site, or operation and operands."""
    keys: dict[fx.Node, Hashable] = {}
    found: dict[Hashable, list[fx.Node]] = defaultdict(list)
    for node in function.nodes:
        if node.op == "output":
            continue
        key: Hashable = (node.op, node.target)
        if node.op == "get_attr" and node.meta["value"].rank < 2:
            key = (node.op, function.parameters[node.target].digest)
        elif node.op == "call_function":
            key = (node.target.name, node.meta.get("site"))
            if key not in shared:
                key = (node.target.name, tuple(keys.get(operand, operand) for operand in _flat(node.args)))
        keys[node] = key
        found[key].append(node)
    return {key: nodes[0] for key, nodes in found.items() if len(nodes) == 1}


def _flat(operands: tuple) -> tuple:
    """The parts of operands of several, as concat has one, too."""
    parts = ((part,) if not isinstance(part, list | tuple) else _flat(tuple(part)) for part in operands)
    return tuple(part for group in parts for part in group)
