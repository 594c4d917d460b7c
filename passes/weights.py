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

from tersor.ir import Function, Parameter, Program
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


@dataclass(frozen=True)
class Affine:
    """``value * scale + shift`` per channel, for all readers of the value but ``spared``; None leaves a part out."""

    spared: frozenset[fx.Node]
    name: str
    scale: torch.Tensor | None = None
    shift: torch.Tensor | None = None


@dataclass
class WeightChange:
    """What a pass wants to do at one place.

    Attributes:
        function: where it is.
        anchor: the node that the report names.
        reason: what is done, for the report.
        figures: what was measured there, for the report.
        derived: parameters that get new contents.
        created: operands that are absent and become parameters: name and tensor.
        dropped: operands that become absent.
        attributes: attributes that get new values.
        affine: values that all but some readers read as value * scale + shift from now on.
    """

    function: Function
    anchor: fx.Node
    reason: str
    derived: dict[Slot, Derivation] = field(default_factory=dict)
    created: dict[Slot, tuple[str, torch.Tensor]] = field(default_factory=dict)
    dropped: set[Slot] = field(default_factory=set)
    attributes: dict[fx.Node, dict[str, object]] = field(default_factory=dict)
    affine: dict[fx.Node, Affine] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)

    @property
    def nodes(self) -> set[fx.Node]:
        """All nodes that it touches."""
        return {node for node, _ in (*self.derived, *self.created, *self.dropped)} | {
            *self.attributes,
            *self.affine,
        }

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
    """Whether a value comes from a linear layer whose weight is a parameter and whose bias is one or is absent.

    Not one of half precision: a change of its weights is rounded, and not equivalent.
    """
    return (
        isinstance(node, fx.Node)
        and node.op == "call_function"
        and node.target.name == "linear"
        and (weight := parameter(function, node, 1)) is not None
        and weight.dtype not in (torch.float16, torch.bfloat16)
        and (operand(node, 2) is None or parameter(function, node, 2) is not None)
    )


def apply_changes(
    pass_: Pass, program: Program, changes: Iterable[WeightChange], result: PassResult
) -> list[WeightChange]:
    """Makes the changes that neither ``skip=`` nor a tie forbids, returns these, and reports both kinds in ``result``.

    A matrix that others read too must change in the same way for all of them; otherwise there would be two
    matrices afterwards where one was stored. Vectors may part.
    """
    accepted, protected = [], pass_.protected(program)
    for change in changes:
        if named := sorted(site_of(node) for node in change.nodes & protected):
            result.skip(
                change.anchor, f"it would change {', '.join(named)}, named in skip=", **change.figures
            )
        else:
            accepted.append(change)
    readers = _readers(program)
    while refused := _untying(readers, accepted):
        for change, other in refused:
            result.skip(
                change.anchor,
                f"its weight is also read by {other}, where it would not change in the same way",
                **change.figures,
            )
            accepted.remove(change)
    for places in readers:
        _derive(program, places, accepted)
    for change in accepted:
        _edit_nodes(change)
        result.change(change.anchor, change.reason, **change.figures)
    for name, function in program.functions.items():
        refresh(
            function, {node for change in accepted if change.function.name == name for node in change.nodes}
        )
    return accepted


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


Reader = tuple[Function, fx.Node, int]
"""A place that reads a parameter; the position is -1 inside a variadic operand."""


def _readers(program: Program) -> list[list[Reader]]:
    """The places that read each parameter; parameters that are the same memory count as one."""
    found: dict[Hashable, list[Reader]] = defaultdict(list)
    for function, node in program.nodes():
        for index, arg in enumerate(node.args):
            for source in _flat(arg):
                if isinstance(source, fx.Node) and source.op == "get_attr":
                    storage = program.parameters[source.target].storage
                    found[storage].append((function, node, index if source is arg else -1))
    return list(found.values())


def _flat(arg: object) -> Iterable[object]:
    if isinstance(arg, list | tuple):
        for item in arg:
            yield from _flat(item)
    else:
        yield arg


def _derivations(changes: list[WeightChange], reader: Reader) -> list[Derivation]:
    _, node, index = reader
    return [change.derived[node, index] for change in changes if (node, index) in change.derived]


def _untying(readers: list[list[Reader]], changes: list[WeightChange]) -> list[tuple[WeightChange, str]]:
    """Changes of matrices that another reader does not share, with that reader."""
    refused: dict[int, tuple[WeightChange, str]] = {}
    for places in readers:
        keys = [tuple(d.key for d in _derivations(changes, reader)) for reader in places]
        if len(set(keys)) == 1:
            continue
        for (function, node, index), key in zip(places, keys, strict=True):
            if not key or parameter(function, node, index).ndim < 2:
                continue
            other = next(p for p, k in zip(places, keys, strict=True) if k != key)
            for change in changes:
                if (node, index) in change.derived:
                    refused[id(change)] = (change, in_words(other[1]))
    return list(refused.values())


def _derive(program: Program, places: list[Reader], changes: list[WeightChange]) -> None:
    """Gives the readers of one parameter its new contents."""
    groups: dict[tuple, list[Reader]] = defaultdict(list)
    for reader in places:
        groups[tuple(d.key for d in _derivations(changes, reader))].append(reader)
    for key, members in groups.items():
        if not key:
            continue
        names = {node.args[index].target for _, node, index in members}
        original = parameter(*members[0])
        tensor = original
        for derivation in _derivations(changes, members[0]):
            tensor = derivation.compute(tensor)
        new = Parameter(tensor.to(original.dtype))
        # readers that part from the others get a parameter of their own
        renamed = (
            {} if len(groups) == 1 else {name: program.parameters.add(name, new) for name in sorted(names)}
        )
        for name in names - renamed.keys():
            program.parameters[name] = new
        for function, node, index in members:
            old = node.args[index]
            node.update_arg(index, function.builder(before=node).read(renamed.get(old.target, old.target)))
            function.erase_dead(old)


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
    for node, affine in change.affine.items():
        _insert(change.function, node, affine)


def _insert(function: Function, node: fx.Node, affine: Affine) -> None:
    dtype, build = node.meta["value"].torch_dtype, function.builder(before=node.next, like=node)
    users = [user for user in node.users if user not in affine.spared]
    restored = node
    if affine.scale is not None:
        restored = build.mul(node, build.parameter(f"{affine.name}.scale", affine.scale.to(dtype)))
    if affine.shift is not None:
        restored = build.add(restored, build.parameter(f"{affine.name}.shift", affine.shift.to(dtype)))
    for user in users:
        user.replace_input_with(node, restored)
