"""The Transformer in a graph: attention and feed-forward layers with their projections, grouped into blocks.

Everything is found from the dataflow, never from names of layers, so it holds for any source and after
rewriting.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import fx

from tersor.ir.program import Function

ROLES = ("query", "key", "value")
"""What an attention's first three operands are."""

NORMS = frozenset({"layer_norm", "rms_norm"})
ACTIVATIONS = frozenset({"gelu", "gelu_tanh", "gelu_sigmoid", "relu", "silu", "sigmoid", "tanh", "erf"})
_LAYOUT = frozenset({"reshape", "permute", "expand", "slice", "concat", "pad", "cast", "cache_update"})
_JOINS = frozenset({"add", "sub"})


@dataclass(frozen=True, eq=False)
class AttentionLayer:
    """An attention operation and what surrounds it; a projection that is not there (or not found) is None.

    One node stands in several roles when projections are fused. ``rotary`` and ``norms`` hold the rotary
    embeddings and norms that lie between the projections and the attention, by operand: "query", "key",
    "value".
    """

    node: fx.Node
    query: fx.Node | None
    key: fx.Node | None
    value: fx.Node | None
    output: fx.Node | None
    rotary: dict[str, fx.Node]
    norms: dict[str, fx.Node]
    cross: bool  # keys come from another value than queries

    @property
    def last(self) -> fx.Node:
        return self.output or self.node

    @property
    def inputs(self) -> tuple[fx.Node, ...]:
        return tuple(n for n in (self.query, self.key, self.value) if n is not None)


@dataclass(frozen=True, eq=False)
class FeedForward:
    """linear, activation, linear; or gated: linear(activation(gate) * up). ``gate`` is ``up`` when both are
    fused.
    """

    up: fx.Node
    gate: fx.Node | None
    down: fx.Node
    activation: fx.Node
    norm: fx.Node | None  # between activation and down

    @property
    def last(self) -> fx.Node:
        return self.down

    @property
    def inputs(self) -> tuple[fx.Node, ...]:
        return (self.up,) if self.gate is None else (self.gate, self.up)


Layer = AttentionLayer | FeedForward


@dataclass(frozen=True, eq=False)
class Block:
    """Layers between one self-attention (included) and the next, in order."""

    layers: tuple[Layer, ...]


def attention_layers(function: Function) -> list[AttentionLayer]:
    """Every attention operation, in order."""
    return [_attention(node) for node in function.calls("attention")]


def feed_forwards(
    function: Function, attentions: Iterable[AttentionLayer] | None = None
) -> list[FeedForward]:
    """Every feed-forward layer whose result joins a residual, in order of ``down``."""
    layers = attention_layers(function) if attentions is None else attentions
    taken = {n for layer in layers for n in (*layer.inputs, layer.output)}
    found = (_feed_forward(node) for node in function.calls("linear") if node not in taken)
    return [layer for layer in found if layer is not None and not taken.intersection(layer.inputs)]


def find_blocks(function: Function) -> list[Block]:
    """The layers in order, a new block at each self-attention that follows another one.

    A decoder's cross-attention belongs to the block of the self-attention before it.
    """
    order = {node: i for i, node in enumerate(function.graph.nodes)}
    attentions = attention_layers(function)
    layers: list[Layer] = [*attentions, *feed_forwards(function, attentions)]
    layers.sort(key=lambda layer: order[layer.last])
    blocks: list[list[Layer]] = []
    for layer in layers:
        starts = _is_self_attention(layer) and any(map(_is_self_attention, blocks[-1])) if blocks else True
        if starts:
            blocks.append([])
        blocks[-1].append(layer)
    return [Block(tuple(block)) for block in blocks]


def residual_join(layer: Layer) -> fx.Node | None:
    """The addition that joins a layer's result to the residual stream."""
    node, seen = layer.last, set()
    while True:
        users = [u for u in node.users if _carries(u, node)]
        joins = [u for u in users if is_join(u)]
        if joins:
            return joins[0]
        if len(users) != 1 or users[0] in seen:
            return None
        seen.add(node := users[0])


def is_join(node: fx.Node) -> bool:
    """An addition of two different computed values: a place where branches meet."""
    if node.op != "call_function" or node.target.name not in _JOINS:
        return False
    operands = [a for a in node.args if isinstance(a, fx.Node) and a.op != "get_attr"]
    return len(operands) == 2 and operands[0] is not operands[1]


def is_norm(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target.name in NORMS


def source(node: fx.Node) -> fx.Node:
    """The value behind casts and norms."""
    while node.op == "call_function" and (node.target.name in NORMS or node.target.name == "cast"):
        node = node.args[0]
    return node


def _is_self_attention(layer: Layer) -> bool:
    return isinstance(layer, AttentionLayer) and not layer.cross


def _attention(node: fx.Node) -> AttentionLayer:
    found, rotary, norms = {}, {}, {}
    for role, operand in zip(ROLES, node.args, strict=False):
        walk = _Walk(operand)
        found[role] = walk.only
        if walk.only is not None:
            for passed in walk.passed:
                if is_norm(passed):
                    norms[role] = passed
                elif passed.target.name == "rotary_embedding":
                    rotary[role] = passed
    query, key = found["query"], found["key"]
    cross = query is not None and key is not None and source(query.args[0]) is not source(key.args[0])
    return AttentionLayer(node, **found, output=_output(node), rotary=rotary, norms=norms, cross=cross)


def _output(node: fx.Node) -> fx.Node | None:
    """The one linear that an attention's result goes to, before it meets the residual stream."""
    found: dict[fx.Node, None] = {}
    stack = [node]
    while stack:
        current = stack.pop()
        for user in current.users:
            if user.op != "call_function" or is_join(user):
                continue
            if user.target.name == "linear":
                found[user] = None
            elif _carries(user, current):
                stack.append(user)
    return next(iter(found)) if len(found) == 1 else None


def _feed_forward(down: fx.Node) -> FeedForward | None:
    if not isinstance(down.args[0], fx.Node):
        return None
    walk = _Walk(down.args[0])
    activated = {n: act for n, act in walk.linears.items() if act is not None}
    if walk.others or not activated or len(walk.linears) > 2:
        return None
    norm = next((n for n in walk.passed if is_norm(n)), None)
    first, act = next(iter(activated.items()))
    if len(walk.linears) == 1:
        fused = any(n.target.name == "slice" for n in walk.passed)
        layer = FeedForward(first, first if fused else None, down, act, norm)
    else:
        if len(activated) == 2:
            return None
        up = next(n for n in walk.linears if n is not first)
        layer = FeedForward(up, first, down, act, norm)
    return layer if residual_join(layer) is not None else None


class _Walk:
    """What a value is made of, back to the linears that produce it.

    Attributes:
        linears: those linears, each with the activation last passed on some way from it (None: on no way).
        others: values of other origin: inputs, embeddings, attentions, products.
        passed: the nodes on the ways, from the value backwards.
    """

    def __init__(self, start: fx.Node):
        self.linears: dict[fx.Node, fx.Node | None] = {}
        self.others: list[fx.Node] = []
        self.passed: list[fx.Node] = []
        stack: list[tuple[fx.Node, fx.Node | None]] = [(start, None)]
        seen = set(stack)
        while stack:
            node, activation = stack.pop()
            if _is_constant(node):
                continue
            if node.op == "call_function" and node.target.name == "linear":
                self.linears[node] = self.linears.get(node) or activation
                continue
            if not _is_form(node):
                self.others.append(node)
                continue
            if node not in self.passed:
                self.passed.append(node)
            step = node if node.target.name in ACTIVATIONS else activation
            for operand in reversed(list(_data(node))):
                if (operand, step) not in seen:
                    seen.add((operand, step))
                    stack.append((operand, step))

    @property
    def only(self) -> fx.Node | None:
        """The linear that the whole value comes from, if there is just one and nothing else."""
        return next(iter(self.linears)) if len(self.linears) == 1 and not self._mixed else None

    @property
    def _mixed(self) -> bool:
        # An input (a cache of keys, positions) may come in beside the projection; computed values may not.
        return any(n.op == "call_function" for n in self.others)


def _data(node: fx.Node) -> Iterator[fx.Node]:
    """The operands that a node's result is made of: without tables, conditions and norm parameters."""
    if node.target.name in NORMS or node.target.name == "rotary_embedding":
        yield node.args[0]
    elif node.target.name == "cache_update":
        yield from node.args[:2]
    elif node.target.name == "where":
        yield from (a for a in node.args[1:] if isinstance(a, fx.Node))
    else:
        yield from node.all_input_nodes


def _carries(user: fx.Node, value: fx.Node) -> bool:
    """Whether the user's result is that value in another form."""
    return _is_form(user) and value in _data(user)


def _is_form(node: fx.Node) -> bool:
    """Whether a node only moves, normalises or maps the elements of its operands."""
    if node.op != "call_function":
        return False
    name = node.target.name
    return (
        name in _LAYOUT or name in NORMS or name == "rotary_embedding" or node.target.elementwise is not None
    )


def _is_constant(node: fx.Node) -> bool:
    return node.op == "get_attr" or (node.op == "call_function" and node.target.name in ("arange", "full"))
