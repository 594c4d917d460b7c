"""What the folds of attention have in common: the linear layers before and after it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from tersor.ir import Function
from tersor.ir.structure import ROLES
from tersor.passes.sites import in_words, site_of
from tersor.passes.weights import is_plain_linear, operand, parameter

QUERY, KEY, VALUE, MASK = range(4)
_BETWEEN = ("rotary_embedding", "reshape", "rms_norm", "layer_norm")


@dataclass(frozen=True)
class Projection:
    """The linear layer that makes the queries, keys or values of an attention.

    Attributes:
        linear: the layer.
        between: what lies between it and the attention (rotary embedding, a norm per head), in order.
    """

    linear: fx.Node
    between: tuple[fx.Node, ...]

    def has(self, *operations: str) -> bool:
        return any(node.target.name in operations for node in self.between)


def projection(function: Function, attention: fx.Node, role: int) -> Projection | str:
    """The projection of a role of which nothing else reads any part; otherwise what stands in the way."""
    name, between = ROLES[role], []
    user, node = attention, attention.args[role]
    while True:
        if others := [other for other in node.users if other is not user]:
            return f"the {name} is also read by {in_words(others[0])}"
        # the same value as key and value, say
        if sum(argument is node for argument in user.args) > 1:
            return f"the {name} has a second role in {site_of(user)}"
        if node.op != "call_function" or node.target.name not in _BETWEEN:
            break
        between.insert(0, node)
        user, node = node, node.args[0]
    if not is_plain_linear(function, node):
        return f"the {name} comes from {in_words(node)}, not from a linear layer with plain weights"
    return Projection(node, tuple(between))


def output_projection(function: Function, attention: fx.Node) -> fx.Node | str:
    """The linear layer that alone reads an attention; otherwise what stands in the way."""
    for user in attention.users:
        if not is_plain_linear(function, user) or user.args[0] is not attention:
            return f"its result is read by {in_words(user)}, not by a linear layer with plain weights"
    if len(attention.users) != 1:
        return f"{len(attention.users)} places read its result"
    return next(iter(attention.users))


def every_query_sees_a_key(attention: fx.Node) -> bool:
    """Whether each query surely attends to some key, so that its softmax sums to one.

    A mask over keys alone (padding) hides all of them only where a whole sequence is padding, whose result has no
    meaning. Combined with a causal or per-query mask it may hide all that a query sees in a valid sequence.
    """
    mask, (length, keys) = operand(attention, MASK), _lengths(attention)
    if mask is not None and _differs_by_query(mask):
        return False
    if not attention.kwargs.get("causal"):
        return attention.kwargs.get("window") is None
    ordered = length == keys or (isinstance(length, int) and isinstance(keys, int) and length <= keys)
    return mask is None and ordered


def _differs_by_query(mask: fx.Node) -> bool:
    while mask.op == "call_function" and mask.target.name == "expand":
        mask = mask.args[0]
    shape = mask.meta["value"].shape
    return len(shape) > 1 and shape[-2] != 1


def head_sizes(attention: fx.Node) -> tuple[int, int]:
    """Channels per head of queries and keys, and of values."""
    heads, kv_heads = attention.kwargs["heads"], attention.kwargs["kv_heads"]
    q, _, v = (attention.args[role].meta["value"].shape[2] for role in (QUERY, KEY, VALUE))
    return q // heads, v // kv_heads


def bias_of(function: Function, linear: fx.Node):
    """The bias of a plain linear layer; None when it has none."""
    return parameter(function, linear, 2)


def _lengths(attention: fx.Node) -> tuple:
    return attention.args[QUERY].meta["value"].shape[1], attention.args[KEY].meta["value"].shape[1]
