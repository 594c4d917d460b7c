"""Planned changes to weights: collected by a pass, checked against ties, applied together.

A pass that moves scales or biases between layers, or removes channels, describes each place as a `WeightChange`
without touching the program. `apply_changes` then sees all of them at once, so that a matrix which several places
read (tied layers, prefill and decode) changes for all of them or for none.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field

import torch
from torch import fx

from tersor.ir import Function, Program
from tersor.ir.program import infer
from tersor.passes.base import Pass, PassResult
from tersor.passes.sites import in_words, site_of

Slot = tuple[fx.Node, int]
"""An operand of a node: the node and the operand's position."""


@dataclass(frozen=True)
class Derivation:
    """How a parameter's new tensor follows from its present one.

    Attributes:
        key: says what is computed; equal keys on one parameter must give equal tensors.
        compute: the present tensor -> the new one, in any float type.
    """

    key: Hashable
    compute: Callable[[torch.Tensor], torch.Tensor]


@dataclass
class WeightChange:
    """What a pass wants to do at one place.

    Attributes:
        function: where it is.
        anchor: the node that the report names.
        reason: what is done, for the report.
        derived: parameters that get new contents.
        created: operands that are absent and become parameters: name and tensor.
        dropped: operands that become absent.
        attributes: attributes that get new values.
    """

    function: Function
    anchor: fx.Node
    reason: str
    derived: dict[Slot, Derivation] = field(default_factory=dict)
    created: dict[Slot, tuple[str, torch.Tensor]] = field(default_factory=dict)
    dropped: set[Slot] = field(default_factory=set)
    attributes: dict[fx.Node, dict[str, object]] = field(default_factory=dict)

    @property
    def nodes(self) -> set[fx.Node]:
        """All nodes that it touches."""
        return {node for node, _ in (*self.derived, *self.created, *self.dropped)} | set(self.attributes)

    def select(self, slot: Slot, kept: torch.Tensor, dim: int) -> None:
        """Keeps only these indices of a parameter along ``dim``; an absent operand stays absent."""
        if operand(*slot) is not None:
            key = ("select", dim, tuple(kept.tolist()))
            self.derived[slot] = Derivation(key, lambda tensor: tensor.index_select(dim, kept))

    def add_bias(self, linear: fx.Node, delta: torch.Tensor) -> None:
        """Adds a vector to the bias of a linear layer, which gets one if it has none."""
        if not delta.any():
            return
        if operand(linear, 2) is None:
            weight = linear.args[1].target
            self.created[linear, 2] = (weight.removesuffix("weight") + "bias", delta)
        else:
            self.derived[linear, 2] = Derivation(
                ("add", tuple(delta.tolist())), lambda bias: bias.double() + delta
            )


def operand(node: fx.Node, index: int) -> object:
    """The operand at a position; None when it is absent."""
    return node.args[index] if index < len(node.args) else None


def parameter(function: Function, node: fx.Node, index: int) -> torch.Tensor | None:
    """The parameter at a position of a node's operands; None when there is none or it is computed."""
    return function.parameter(operand(node, index))


def is_plain_linear(function: Function, node: object) -> bool:
    """Whether a value comes from a linear layer whose weight is a parameter and whose bias is one or is absent."""
    return (
        isinstance(node, fx.Node)
        and node.op == "call_function"
        and node.target.name == "linear"
        and parameter(function, node, 1) is not None
        and (operand(node, 2) is None or parameter(function, node, 2) is not None)
    )


def apply_changes(pass_: Pass, program: Program, changes: Iterable[WeightChange], result: PassResult) -> None:
    """Makes the changes that neither ``skip=`` nor a tie forbids, and reports both kinds in ``result``.

    A matrix that others read too must change in the same way for all of them; otherwise there would be two
    matrices afterwards where one was stored. Vectors may part.
    """
    accepted, protected = [], pass_.protected(program)
    for change in changes:
        if named := sorted(site_of(node) for node in change.nodes & protected):
            result.skip(change.anchor, f"it would change {', '.join(named)}, named in skip=")
        else:
            accepted.append(change)
    readers = _readers(program)
    while refused := _untying(program, readers, accepted):
        for change, other in refused:
            result.skip(
                change.anchor,
                f"its weight is also read by {other}, where it would not change in the same way",
            )
            accepted.remove(change)
    touched: dict[str, set[fx.Node]] = defaultdict(set)
    for change in accepted:
        touched[change.function.name] |= change.nodes
    for name, places in readers.items():
        touched_by = _derive(program, name, places, accepted)
        for function, node in touched_by:
            touched[function.name].add(node)
    for change in accepted:
        _edit_nodes(change)
        result.change(change.anchor, change.reason)
    for name, nodes in touched.items():
        refresh(program.functions[name], nodes)


def refresh(function: Function, changed: set[fx.Node]) -> None:
    """Infers the values of changed nodes, and of all that follow from them, anew."""
    stale = set(changed)
    for node in function.graph.nodes:
        if node.op != "call_function" or not (node in changed or stale.intersection(node.all_input_nodes)):
            continue
        value = infer(node.target, node.args, node.kwargs)
        if value != node.meta["value"]:
            stale.add(node)
            node.meta["value"] = value
    output = function.output_node
    output.meta["value"] = tuple(r.meta["value"] for r in function.results)


Reader = tuple[Function, fx.Node, int]
"""A place that reads a parameter; the position is -1 inside a variadic operand."""


def _readers(program: Program) -> dict[str, list[Reader]]:
    found: dict[str, list[Reader]] = defaultdict(list)
    for function, node in program.nodes():
        for index, arg in enumerate(node.args):
            inner = [arg] if isinstance(arg, fx.Node) else [a for a in _flat(arg) if isinstance(a, fx.Node)]
            for source in inner:
                if source.op == "get_attr":
                    found[source.target].append((function, node, index if source is arg else -1))
    return found


def _flat(arg: object) -> Iterable[object]:
    if isinstance(arg, list | tuple):
        for item in arg:
            yield from _flat(item)
    else:
        yield arg


def _derivations(changes: list[WeightChange], reader: Reader) -> list[Derivation]:
    _, node, index = reader
    return [change.derived[node, index] for change in changes if (node, index) in change.derived]


def _untying(
    program: Program, readers: dict[str, list[Reader]], changes: list[WeightChange]
) -> list[tuple[WeightChange, str]]:
    """Changes of matrices that another reader does not share, with that reader."""
    refused: dict[int, tuple[WeightChange, str]] = {}
    for name, places in readers.items():
        if len(places) < 2 or program.parameters[name].tensor.ndim < 2:
            continue
        keys = [tuple(d.key for d in _derivations(changes, reader)) for reader in places]
        if len(set(keys)) == 1:
            continue
        for (_, node, index), key in zip(places, keys, strict=True):
            other = next(p for p, k in zip(places, keys, strict=True) if k != key)
            for change in changes:
                if (node, index) in change.derived:
                    refused[id(change)] = (change, in_words(other[1]))
    return list(refused.values())


def _derive(
    program: Program, name: str, places: list[Reader], changes: list[WeightChange]
) -> list[tuple[Function, fx.Node]]:
    """Computes the new contents of one parameter; returns the nodes that read them."""
    groups: dict[tuple, list[Reader]] = defaultdict(list)
    steps: dict[tuple, list[Derivation]] = {}
    for reader in places:
        derivations = _derivations(changes, reader)
        key = tuple(d.key for d in derivations)
        groups[key].append(reader)
        steps[key] = derivations
    original, touched = program.parameters[name].tensor, []
    for key, members in groups.items():
        if not key:
            continue
        tensor = original
        for derivation in steps[key]:
            tensor = derivation.compute(tensor)
        tensor = tensor.to(original.dtype)
        if len(groups) == 1:
            new_name = name
            program.parameters[name] = tensor
        else:
            new_name = program.parameters.add(name, tensor)
        for function, node, index in members:
            old = node.args[index]
            node.update_arg(index, function.builder(before=node).read(new_name))
            function.erase_dead(old)
            touched.append((function, node))
    return touched


def _edit_nodes(change: WeightChange) -> None:
    for (node, index), (name, tensor) in change.created.items():
        dtype = node.meta["value"].torch_dtype
        args = list(node.args) + [None] * (index + 1 - len(node.args))
        args[index] = change.function.builder(before=node).parameter(name, tensor.to(dtype))
        node.args = tuple(args)
    for node, index in change.dropped:
        old = node.args[index]
        args = [None if i == index else a for i, a in enumerate(node.args)]
        while args and args[-1] is None:
            args.pop()
        node.args = tuple(args)
        change.function.erase_dead(old)
    for node, attributes in change.attributes.items():
        node.kwargs = node.kwargs | attributes
