"""The same places of one model in several functions: a decoder's prefill and its step have the same layers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator, Set

from torch import fx

from tersor.ir import Function

Site = tuple[str, str, tuple[Hashable, ...]]
"""Operation, name of its site, and the parameters that it reads."""

SIZES = {"shape", "end"}
"""Attributes in which the same places of two functions may differ, of operations on lengths."""

OF_LENGTHS = {"reshape", "expand", "full", "arange"}


class Counterparts:
    """The values of one function, ``main``, that belong to those of others of the program.

    An operation has its counterpart at the site of the same name, with the same parameters; where there is none, where
    the same is done to the counterparts of its operands. Matrices are the same by name, as a program stores equal ones
    of a name once; vectors and numbers, which passes add to each function, by content. Inputs, and sites of operations
    without parameters, count as long as no site of one name has other parameters: then these are two models. Sizes may
    differ, but for the last one. Where several fit, there is no counterpart.
    """

    def __init__(self, main: Function):
        self._main = main
        self._found: dict[str, dict[fx.Node, fx.Node]] = {}

    def of(self, function: Function, node: fx.Node) -> fx.Node | None:
        """The node of ``main`` that a node of another function corresponds to."""
        if function.name not in self._found:
            self._found[function.name] = self._match(function)
        return self._found[function.name].get(node)

    def _match(self, function: Function) -> dict[fx.Node, fx.Node]:
        there, here = _sites(self._main), _sites(function)
        shared = there & here
        same_names = {site[:2] for site in there} & {site[:2] for site in here}
        one_model = same_names == {site[:2] for site in shared}
        if not one_model:
            shared = {site for site in shared if site[2]}
        numbers: dict[Hashable, int] = {}
        theirs, ours = (_places(f, shared, one_model, numbers) for f in (self._main, function))
        pairs = ((ours[key], theirs[key]) for key in ours.keys() & theirs.keys())
        return {node: counterpart for node, counterpart in pairs if _alike(node, counterpart)}


def _sites(function: Function) -> Set[Site]:
    return {_site(function, node) for node in function.calls() if node.meta.get("site")}


def _site(function: Function, node: fx.Node) -> Site:
    return node.target.name, node.meta.get("site", ""), tuple(_parameters(function, node))


def _parameters(function: Function, node: fx.Node) -> Iterator[Hashable]:
    """What tells the parameters apart that an operation reads, as they are or decoded."""
    for operand in node.all_input_nodes:
        if operand.op == "get_attr":
            yield _parameter(function, operand)
        elif operand.op == "call_function" and operand.target.name in ("dequantize", "cast"):
            if all(part.op == "get_attr" for part in operand.all_input_nodes):
                yield from _parameters(function, operand)


def _parameter(function: Function, read: fx.Node) -> Hashable:
    return read.target if read.meta["value"].rank > 1 else function.parameters[read.target].digest


def _places(
    function: Function, shared: Set[Site], one_model: bool, numbers: dict[Hashable, int]
) -> dict[int, fx.Node]:
    """Nodes by a number for what says where in the model they are; only those that this tells apart."""
    places: dict[fx.Node, int] = {}
    found: dict[int, list[fx.Node]] = defaultdict(list)
    for node in function.nodes:
        if node.op == "output":
            continue
        key: Hashable = (node.op, node.target) if one_model else (node.op, function.name, node.target)
        if node.op == "get_attr":
            key = (node.op, _parameter(function, node))
        elif node.op == "call_function" and (key := _site(function, node)) not in shared:
            dropped = SIZES if node.target.name in OF_LENGTHS else ()
            attributes = ((name, value) for name, value in node.kwargs.items() if name not in dropped)
            operands = (f"%{places[x]}" if isinstance(x, fx.Node) else repr(x) for x in _flat(node.args))
            key = (node.target.name, tuple(operands), repr(sorted(attributes)))
        places[node] = numbers.setdefault(key, len(numbers))
        found[places[node]].append(node)
    return {number: nodes[0] for number, nodes in found.items() if len(nodes) == 1}


def _flat(operands: tuple) -> Iterator[object]:
    """The parts of operands of several, as concat has one, too."""
    for operand in operands:
        if isinstance(operand, list | tuple):
            yield from _flat(tuple(operand))
        else:
            yield operand


def _alike(ours: fx.Node, theirs: fx.Node) -> bool:
    """Whether two values can have the same statistics."""
    a, b = ours.meta["value"], theirs.meta["value"]
    return a.dtype == b.dtype and a.rank == b.rank and a.shape[-1:] == b.shape[-1:]
