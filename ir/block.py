"""Running a function block by block, cut at the residual stream.

Methods that go through a model in sequence (collect what a block sees, change its weights, go on with what it
now gives) need one sweep and hold the values of one block:

    state = start(function, inputs)
    for block in blocks(function):
        state = block.run(state)
    results = finish(function, state)
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, MutableMapping
from dataclasses import dataclass, field, replace

import torch
from torch import fx

from tersor.ir.interpreter import Observer, bind, collect, execute
from tersor.ir.program import Function
from tersor.ir.site import structural_names
from tersor.ir.structure import attention_layers, find_blocks, residual_join


@dataclass(frozen=True)
class BlockState:
    """What stands between two blocks: the values that later blocks or the results need, and the sizes of the
    dims.
    """

    values: Mapping[fx.Node, torch.Tensor]
    sizes: Mapping[str, int]
    dtype: torch.dtype | None = None


@dataclass(frozen=True, eq=False)
class Block:
    """A part of a function that is run at once.

    Attributes:
        name: ``block.3`` after its layers, as in structural site names; "embedding" before the first and
        "head" behind
            the last; "other" between.
        nodes: operations and the parameters they read, in order.
        inputs: values from earlier that it reads.
        stream: the residual stream's value at its end; None for the last one.
        carried: values that later blocks or the results need.
    """

    name: str
    function: Function = field(repr=False)
    nodes: tuple[fx.Node, ...] = field(repr=False)
    inputs: tuple[fx.Node, ...]
    stream: fx.Node | None
    carried: frozenset[fx.Node] = field(repr=False)

    def run(self, state: BlockState, observe: Observer | None = None) -> BlockState:
        """The state behind this block; the one given is left as it is, so a block can run again with new
        weights.
        """
        values = dict(state.values)
        execute(
            self.function, list(self.nodes), values, state.sizes,
            keep=self.carried, observe=observe, dtype=state.dtype,
        )  # fmt: skip
        return BlockState({n: v for n, v in values.items() if n in self.carried}, state.sizes, state.dtype)

    @property
    def operations(self) -> list[fx.Node]:
        """Its nodes without the parameters they read."""
        return [n for n in self.nodes if n.op != "get_attr"]

    def cut(self, first: Collection[fx.Node]) -> tuple[Block, Block]:
        """Two parts, to be run one after the other: those of its operations that are in ``first``, and the rest.

        Each reads the parameters that it needs itself, so the rest sees those that change in between.
        """
        chosen = set(first)
        rest = self._part([n for n in self.operations if n not in chosen], self.carried)
        needed = self.carried - set(rest.nodes) | set(rest.inputs)
        return self._part([n for n in self.operations if n in chosen], needed), rest

    def _part(self, operations: list[fx.Node], carried: Collection[fx.Node]) -> Block:
        return _block(self.name, self.function, operations, self.stream, carried)


def start(
    function: Function,
    inputs: Mapping[str, torch.Tensor],
    dtype: torch.dtype | None = None,
    states: Mapping[str, torch.Tensor] | None = None,
) -> BlockState:
    """The state before the first block; ``dtype`` and the program's ``states`` as for `run`.

    Raises:
        InputError: the inputs do not fit the signature.
    """
    placeholders = function.graph.find_nodes(op="placeholder")
    values, sizes = bind(function, inputs, states)
    execute(function, list(placeholders), values, sizes, keep=set(placeholders), dtype=dtype)
    return BlockState(values, sizes, dtype)


def finish(
    function: Function, state: BlockState, states: MutableMapping[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """The function's results by name, from the state behind the last block; ``states`` gets the new ones."""
    return collect(function, state.values, states)


def blocks(function: Function) -> list[Block]:
    """The function in parts, in order; a single one where the graph has no residual stream.

    A cut is a value through which everything goes on. Beside it only these may pass: inputs that hold no
    floats, masks and position tables, values computed from parameters alone, and what cross-attentions read.
    Of all such cuts those before a self-attention, behind an encoder, and behind the last layer are used.
    """
    nodes = [n for n in function.graph.nodes if n.op not in ("output", "get_attr")]
    flow = _Flow(function, nodes)
    cuts = _cuts(function, flow)
    names = structural_names(function)
    parts: list[tuple[list[fx.Node], fx.Node | None]] = []
    placed: set[fx.Node] = set()
    for cut in [*cuts, None]:
        part = [n for n in nodes if n not in placed and (cut is None or n is cut or flow.precedes(n, cut))]
        placed.update(part)
        for node in flow.kept_only:  # belongs where its operands are
            operands = [o for o in node.all_input_nodes if o.op == "call_function"]
            if node not in placed and all(o in placed for o in operands):
                placed.add(node)
                part.append(node)
        part = [n for n in part if n.op != "placeholder"]
        if part:
            parts.append((part, cut))
    found: list[Block] = []
    needed = set(function.ends)
    for part, cut in reversed(parts):
        found.append(_block(_name(part, names), function, part, cut, needed))
        needed = needed - set(part) | set(found[-1].inputs)
    return _with_ends_named(found[::-1])


def _block(
    name: str, function: Function, operations: list[fx.Node], stream: fx.Node | None, carried: Collection[fx.Node]
) -> Block:  # fmt: skip
    """A block of these operations and the parameters that they read."""
    inside = set(operations)
    reads = {operand: None for n in operations for operand in n.all_input_nodes if operand not in inside}
    inputs = tuple(n for n in reads if n.op != "get_attr")
    nodes = inside.union(n for n in reads if n.op == "get_attr")
    ordered = tuple(n for n in function.graph.nodes if n in nodes)
    return Block(name, function, ordered, inputs, stream, frozenset(carried))


class _Flow:
    """Which values depend on which, as bit sets over the positions of nodes."""

    def __init__(self, function: Function, nodes: list[fx.Node]):
        self.nodes = nodes
        results = _reached(function.results)
        # what only the next call reads: it stands beside the stream
        self.kept_only = [n for n in nodes if n.op == "call_function" and n not in results]
        self._bit = {node: 1 << i for i, node in enumerate(nodes)}
        self._before: dict[fx.Node, int] = {}  # everything it depends on
        for node in nodes:
            self._before[node] = self._union(
                self._before[o] | self._bit[o] for o in node.all_input_nodes if o in self._bit
            )
        self._aside = self._values_aside(function)
        self._reads: dict[fx.Node, int] = {}  # everything that reads a stream value it depends on
        for node in nodes:
            self._reads[node] = self._union(
                self._reads[o]
                | (0 if o in self._aside else self._union(self._bit[u] for u in o.users if u in results))
                for o in node.all_input_nodes
                if o in self._bit
            )

    def precedes(self, node: fx.Node, other: fx.Node) -> bool:
        return bool(self._before[other] & self._bit[node])

    def is_cut(self, node: fx.Node) -> bool:
        """Whether the stream goes through this value alone."""
        return (
            node.op == "call_function"
            and node.meta["value"].is_float
            and not self._reads[node] & ~(self._before[node] | self._bit[node])
        )

    def in_stream(self, node: fx.Node) -> bool:
        return node not in self._aside

    def _values_aside(self, function: Function) -> set[fx.Node]:
        """The values that may pass beside a cut."""
        from_inputs: set[fx.Node] = set()
        from_floats: set[fx.Node] = set()  # from float inputs or through float parameters
        for node in self.nodes:
            operands = node.all_input_nodes
            if node.op == "placeholder" or any(o in from_inputs for o in operands):
                from_inputs.add(node)
            if (node.op == "placeholder" and node.meta["value"].is_float) or any(
                o in from_floats or (o.op == "get_attr" and o.meta["value"].is_float) for o in operands
            ):
                from_floats.add(node)
        data: set[fx.Node] = set()  # what a result is made of, other than by masks and position tables
        for node in reversed(function.graph.nodes):
            if node.op == "output" or node in data:
                data.update(_data_operands(node))
        aside = {n for n in self.nodes if n not in from_inputs or n not in from_floats or n not in data}
        return aside | set(_contexts(function))

    @staticmethod
    def _union(sets: Iterable[int]) -> int:
        union = 0
        for one in sets:
            union |= one
        return union


def _reached(ends: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes that these are made of, and these."""
    found, stack = set(), list(ends)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found


def _cuts(function: Function, flow: _Flow) -> list[fx.Node]:
    layers = attention_layers(function)
    starts = [layer.node for layer in layers if not layer.cross] or [layer.node for layer in layers]
    candidates = [n for n in flow.nodes if flow.in_stream(n) and flow.is_cut(n)]
    chosen = {n for n in _contexts(function) if flow.is_cut(n)}
    for node in starts:
        before = [c for c in candidates if flow.precedes(c, node)]
        chosen.update(before[-1:])
    ends = {residual_join(layer) for block in find_blocks(function)[-1:] for layer in block.layers}
    names = structural_names(function)
    # In a post-norm model the last layer's norm, which has its place in that block, is part of it.
    behind = [
        c for c in candidates if c in ends or (c.args[0] in ends and names.get(c, "").startswith("block."))
    ]
    chosen.update(behind[-1:])
    return [n for n in flow.nodes if n in chosen]


def _contexts(function: Function) -> list[fx.Node]:
    """The values that cross-attentions take their keys and values from."""
    layers = [layer for layer in attention_layers(function) if layer.cross]
    projections = [p for layer in layers for p in (layer.key, layer.value) if p is not None]
    return list(dict.fromkeys(p.args[0] for p in projections))


def _data_operands(node: fx.Node) -> Iterable[fx.Node]:
    if node.op == "call_function" and node.target.name == "attention":
        return node.args[:3]
    if node.op == "call_function" and node.target.name == "rotary_embedding":
        return node.args[:1]
    return node.all_input_nodes


def _name(part: list[fx.Node], names: Mapping[fx.Node, str]) -> str:
    """The structural block that the nodes belong to, or the first and the last of several."""
    given = [names[n].split(".") for n in part if n in names]
    numbers = sorted({int(parts[1]) for parts in given if parts[0] == "block"})
    if not numbers:
        return "other"
    return f"block.{numbers[0]}" if len(numbers) == 1 else f"block.{numbers[0]}-{numbers[-1]}"


def _with_ends_named(parts: list[Block]) -> list[Block]:
    """Parts before the first layer are called "embedding", those behind the last one "head"."""
    named = [i for i, part in enumerate(parts) if part.name != "other"]
    if not named:
        return parts
    before, after = parts[: named[0]], parts[named[-1] + 1 :]
    inner = parts[named[0] : named[-1] + 1]
    return [
        *(replace(p, name="embedding") for p in before),
        *inner,
        *(replace(p, name="head") for p in after),
    ]
