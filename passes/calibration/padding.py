"""Which rows of a value are tokens, and which are padding.

Padding is found from the graph: a token is padding when no query of any self-attention of its stream may attend to it,
whatever convention the model's mask input follows. A stream is everything that is computed token by token from the
same tokens: an encoder and a decoder are two. A mask that the user names instead holds for every value of its shape.
"""

from __future__ import annotations

from collections.abc import Mapping

import networkx as nx
import torch
from torch import fx

from tersor.ir import Function
from tersor.ir.canonicalize.masks import HIDDEN
from tersor.ir.interpreter import bind, execute, resolve
from tersor.ir.structure import attention_layers

_MASK = 3
_CODES = frozenset({"quantize", "integer_linear", "grouped_integer_linear", "saturate"})
_HEAVY = frozenset({"linear", "matmul", "attention", "conv1d", "conv2d"})


class Padding:
    """Finds the padding of a function's values, batch by batch."""

    def __init__(self, function: Function):
        self._function = function
        self._masks: dict[fx.Node, list[fx.Node]] = {}  # any node of a stream -> its self-attentions' masks
        self._needed: dict[fx.Node, None] = {}
        streams = _streams(function)
        by_stream: dict[int, list[fx.Node]] = {}
        for layer in attention_layers(function):
            if not layer.cross:
                by_stream.setdefault(id(streams[layer.node]), []).append(layer.node)
        for node, stream in streams.items():
            attentions = by_stream.get(id(stream), [])
            masks = [a.args[_MASK] if len(a.args) > _MASK else None for a in attentions]
            if masks and all(mask is not None and _is_light(mask) for mask in masks):
                self._masks[node] = attentions
                self._needed.update(dict.fromkeys(masks))

    def of(self, inputs: Mapping[str, torch.Tensor], given: torch.Tensor | None = None) -> Tokens:
        """The padding in one batch; ``given`` is the user's mask [batch, length], other than 0 at tokens."""
        if given is not None:
            return Tokens({}, given != 0)
        if not self._needed:
            return Tokens({}, None)
        function = self._function
        ancestors = _ancestors(self._needed)
        nodes = [n for n in function.graph.nodes if n in ancestors]
        values, sizes = bind(function, inputs, None)
        with torch.no_grad():
            execute(function, nodes, values, sizes, keep=set(self._needed))
        seen: dict[tuple[fx.Node, int], torch.Tensor] = {}
        found: dict[int, torch.Tensor] = {}
        by_node: dict[fx.Node, torch.Tensor] = {}
        for node, attentions in self._masks.items():
            if id(attentions) not in found:
                batch = resolve(attentions[0].args[0].meta["value"].shape[0], sizes)
                for a in attentions:
                    mask = a.args[_MASK]
                    if (mask, batch) not in seen:
                        seen[mask, batch] = _visible(values[mask], batch)
                kinds = [seen[a.args[_MASK], batch] for a in attentions]
                found[id(attentions)] = torch.stack(kinds).any(0)
            by_node[node] = found[id(attentions)]
        return Tokens(by_node, None)


class Tokens:
    """Which tokens of a batch are none: booleans [batch, length], true at tokens, by value or for all values."""

    def __init__(self, by_value: Mapping[fx.Node, torch.Tensor], everywhere: torch.Tensor | None):
        self._by_value, self._everywhere = by_value, everywhere

    def rows(self, node: fx.Node, tensor: torch.Tensor) -> torch.Tensor:
        """The value's rows [n, channels] without padding; all where it is not laid out by token."""
        rows = tensor.reshape(-1, tensor.shape[-1]) if tensor.ndim else tensor.reshape(1, 1)
        mask = self._everywhere if self._everywhere is not None else self._by_value.get(node)
        if mask is None or mask.all():  # a selection would copy
            return rows
        if tensor.ndim > mask.ndim and tensor.shape[: mask.ndim] == mask.shape:
            return tensor[mask].reshape(-1, tensor.shape[-1])
        if tensor.ndim == 2 and len(rows) == mask.numel():
            return rows[mask.reshape(-1)]
        return rows


def _visible(mask: torch.Tensor, batch: int) -> torch.Tensor:
    """The keys [batch, keys] that some query of some head sees."""
    seen = mask if mask.dtype == torch.bool else mask > HIDDEN
    return seen.any(2).any(1).expand(batch, -1)


def _streams(function: Function) -> dict[fx.Node, set[fx.Node]]:
    """The stream of each value: those that are computed from each other token by token."""
    graph = nx.Graph()
    for node in function.calls():
        graph.add_node(node)
        first_only = node.target.name in ("attention", "rotary_embedding")
        operands = node.args[:1] if first_only else node.all_input_nodes
        for operand in operands:
            if _is_content(operand):
                graph.add_edge(node, operand)
    return {node: stream for stream in nx.connected_components(graph) for node in stream}


def _is_content(operand: fx.Node) -> bool:
    """Whether an operand says something of each token: no parameter, mask, index or position."""
    if operand.op == "get_attr":
        return False
    in_codes = operand.op == "call_function" and operand.target.name in _CODES
    return in_codes or operand.meta["value"].is_float


def _ancestors(nodes: Mapping[fx.Node, None]) -> set[fx.Node]:
    found, stack = set(), list(nodes)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found


def _is_light(mask: fx.Node) -> bool:
    """Whether a mask is made without running layers."""
    return not any(n.op == "call_function" and n.target.name in _HEAVY for n in _ancestors({mask: None}))
