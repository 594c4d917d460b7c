"""Questions about a function as a graph: dataflow for networkx, and which channels of which parameters go
together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import networkx as nx
from torch import fx

from tersor.ir.program import Function, Program
from tersor.ir.site import structural_names
from tersor.ir.structure import AttentionLayer, FeedForward, attention_layers, feed_forwards, is_norm


def dataflow(function: Function) -> nx.DiGraph:
    """The function's nodes with an edge from each operand to its user, for networkx's algorithms."""
    graph = nx.DiGraph()
    for node in function.graph.nodes:
        graph.add_node(node)
        graph.add_edges_from((operand, node) for operand in node.all_input_nodes)
    return graph


@dataclass(frozen=True)
class Channels:
    """A stretch of a parameter's axis that holds ``size`` channels for each unit, unit after unit from
    ``start``.
    """

    parameter: str
    axis: int
    start: int
    size: int

    def of(self, unit: int) -> slice:
        """The channels of one unit."""
        begin = self.start + unit * self.size
        return slice(begin, begin + self.size)


@dataclass(frozen=True)
class ChannelGroup:
    """Units (neurons of a feed-forward layer, groups of heads) that can only be removed from all members at
    once.

    Attributes:
        name: the layer's structural name, ``block.3.ffn``.
        function: the function it is in.
        layer: the nodes.
        unit: what a unit is: "neuron", "head", or "head group" (a key head with the query heads that it
        serves).
        count: how many units there are.
        members: the parameters' channels that belong to them.
        through: the operations on the way that keep units apart.
        obstacle: why units cannot be removed; None when they can.
    """

    name: str
    function: str
    layer: AttentionLayer | FeedForward
    unit: str
    count: int
    members: tuple[Channels, ...]
    through: tuple[fx.Node, ...]
    obstacle: str | None

    def __str__(self) -> str:
        """What goes together and why, one line per member."""
        width = max((len(m.parameter) for m in self.members), default=0)
        lines = [f"{self.name}: {self.count} {self.unit}s"]
        lines += [
            f"  {m.parameter:{width}}  axis {m.axis}, {m.size} per {self.unit} from {m.start}"
            for m in self.members
        ]
        if self.through:
            lines.append(f"  through {', '.join(f'%{n.name}' for n in self.through)}")
        if self.obstacle:
            lines.append(f"  cannot be removed: {self.obstacle}")
        return "\n".join(lines)


def channel_groups(program: Program) -> list[ChannelGroup]:
    """The hidden neurons of every feed-forward layer and the heads of every attention, in order of the
    layers.
    """
    readers: dict[tuple, set[fx.Node]] = {}
    for function, node in program.nodes():
        if node.op == "get_attr" and node.users:
            readers.setdefault(function.parameters[node.target].storage, set()).add(node)
    groups = []
    for function in program.functions.values():
        names = structural_names(function)
        attentions = attention_layers(function)
        order = {node: i for i, node in enumerate(function.graph.nodes)}
        layers = sorted(
            [*attentions, *feed_forwards(function, attentions)], key=lambda layer: order[layer.last]
        )
        for layer in layers:
            if isinstance(layer, AttentionLayer):
                groups.append(_heads(function, layer, names[layer.node], readers))
            else:
                groups.append(_neurons(function, layer, names[layer.down].rpartition(".")[0], readers))
    return groups


class _Group:
    """A group being collected: members, the nodes on the way, the first obstacle met."""

    def __init__(self, function: Function):
        self._function = function
        self.members: list[Channels] = []
        self.reads: set[fx.Node] = set()
        self.through: dict[fx.Node, None] = {}
        self.ends: set[fx.Node] = set()
        self.obstacle: str | None = None

    def fail(self, why: str) -> None:
        self.obstacle = self.obstacle or why

    def add(self, node: fx.Node, axis: int, start: int, size: int) -> None:
        if node.op != "get_attr":
            return self.fail(f"%{node.name} is computed, not a parameter")
        self.reads.add(node)
        self.members.append(Channels(node.target, axis, start, size))

    def add_producers(self, value: fx.Node, linears: Iterable[fx.Node | None], units: _Units) -> None:
        """The outputs of the linears that ``value`` is made from; its last dimension holds the units."""
        wanted = {n for n in linears if n is not None}
        for linear, start in self._trace(value, wanted, units):
            for operand in linear.args[1:3]:
                if operand is not None:
                    self.add(operand, 0, start, units.size)

    def add_consumer(self, linear: fx.Node, producer: fx.Node, units: _Units) -> None:
        """The inputs of a linear that reads what ``producer`` makes; its last dimension holds the units."""
        self._trace(linear.args[0], {producer}, units)
        self.add(linear.args[1], 1, 0, units.size)
        self.ends.add(linear)

    def _trace(self, value: fx.Node, ends: set[fx.Node], units: _Units) -> list[tuple[fx.Node, int]]:
        """Goes back from a value to ``ends``; gives each with the position at which the units start in it."""
        found: dict[tuple[fx.Node, int], None] = {}
        stack = [(value, 0)]
        while stack:
            node, start = stack.pop()
            if node in ends:
                found[node, start] = None
                self.ends.add(node)
                continue
            operands = units.operands(node)
            if operands is None:
                self.fail(f"%{node.name} mixes units or comes from elsewhere")
                continue
            self.through[node] = None
            if node.target.name == "slice":
                start += node.kwargs.get("start", 0)
            for operand in operands:
                if operand.op == "get_attr":
                    self.add(operand, operand.meta["value"].rank - 1, 0, units.size)
                else:
                    stack.append((operand, start))
        if missing := ends - {node for node, _ in found}:
            self.fail(f"no way found from %{value.name} to {', '.join(f'%{n.name}' for n in missing)}")
        return list(found)

    def close(self, readers: Mapping[tuple, set[fx.Node]]) -> None:
        """Finds what else reads the group's values and parameters."""
        inside = self.ends | self.through.keys()
        for node in inside | self.reads:
            last = node.op == "call_function" and node.target.name == "linear" and self._is_consumer(node)
            outside = [] if last else [u for u in node.users if u not in inside]
            if outside:
                self.fail(f"%{node.name} is also read by %{outside[0].name}")
        for node in self.reads:
            for other in readers[self._function.parameters[node.target].storage] - self.reads:
                self.fail(
                    f"parameter {node.target!r} is also read as {other.target!r} by %{next(iter(other.users)).name}"
                )

    def _is_consumer(self, linear: fx.Node) -> bool:
        return any(m.axis == 1 and m.parameter == linear.args[1].target for m in self.members)


@dataclass(frozen=True)
class _Units:
    """How a value's last dimension is made of units: ``count`` of ``size`` channels; heads may be split off
    it.
    """

    count: int
    size: int
    heads: int = 0

    @property
    def width(self) -> int:
        return self.count * self.size

    def operands(self, node: fx.Node) -> list[fx.Node] | None:
        """The operands with the same units, for an operation that keeps units apart; None for any other."""
        if node.op != "call_function" or not self._holds(node):
            return None
        name, first = node.target.name, node.args[0] if node.args else None
        if name in ("cast", "rotary_embedding"):
            return [first]
        if name == "slice":
            last = node.kwargs["dim"] in (-1, node.meta["value"].rank - 1)
            plain = isinstance(node.kwargs.get("start", 0), int) and node.kwargs.get("step", 1) == 1
            return [first] if last and plain else None
        if name == "reshape":
            return [first] if self.heads and self._holds(first) else None
        if is_norm(node):
            return [first] if self.heads and not self._is_flat(node) else None
        if node.target.elementwise is None:
            return None
        operands = [n for n in node.all_input_nodes if not self._is_broadcast(n)]
        known = all(self._holds(n) and (n.op != "get_attr" or self._is_flat(n)) for n in operands)
        return operands if known else None

    def _holds(self, node: fx.Node) -> bool:
        return self._is_flat(node) or (
            bool(self.heads) and node.meta["value"].shape[-2:] == (self.heads, self.width // self.heads)
        )

    def _is_flat(self, node: fx.Node) -> bool:
        shape = node.meta["value"].shape
        return bool(shape) and shape[-1] == self.width

    @staticmethod
    def _is_broadcast(node: fx.Node) -> bool:
        shape = node.meta["value"].shape
        return not shape or shape[-1] == 1


def _neurons(function: Function, layer: FeedForward, name: str, readers: Mapping) -> ChannelGroup:
    count = layer.down.args[1].meta["value"].shape[1]
    group, units = _Group(function), _Units(count, 1)
    group.add_producers(layer.down.args[0], layer.inputs, units)
    group.add(layer.down.args[1], 1, 0, 1)
    group.ends.add(layer.down)
    return _closed(group, readers, name, function, layer, "neuron", count)


def _heads(function: Function, layer: AttentionLayer, name: str, readers: Mapping) -> ChannelGroup:
    q, _, v = layer.node.args[:3]
    heads, kv_heads = layer.node.kwargs["heads"], layer.node.kwargs["kv_heads"]
    served, size = heads // kv_heads, q.meta["value"].shape[2] // heads
    value_size = v.meta["value"].shape[2] // kv_heads
    group = _Group(function)
    for operand, projection, per_unit, split in (
        (q, layer.query, served * size, heads),
        (layer.node.args[1], layer.key, size, kv_heads),
        (v, layer.value, value_size, kv_heads),
    ):
        if projection is None:
            group.fail(f"%{operand.name} does not come from one linear")
        else:
            group.add_producers(operand, (projection,), _Units(kv_heads, per_unit, split))
    if layer.output is None:
        group.fail(f"%{layer.node.name} does not go to one linear")
    else:
        group.add_consumer(layer.output, layer.node, _Units(kv_heads, served * value_size, heads))
    unit = "head" if served == 1 else "head group"
    return _closed(group, readers, name, function, layer, unit, kv_heads)


def _closed(group: _Group, readers: Mapping, name: str, function: Function, layer: AttentionLayer | FeedForward,
            unit: str, count: int) -> ChannelGroup:  # fmt: skip
    group.ends.add(layer.node if isinstance(layer, AttentionLayer) else layer.down)
    group.close(readers)
    return ChannelGroup(
        name, function.name, layer, unit, count, tuple(group.members), tuple(group.through), group.obstacle
    )
