"""What the quantizing passes find in a program: layers and tables, and what is quantized of them already."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from tersor.ir import Function, Program
from tersor.ir.matching import is_call
from tersor.ir.text import human_bytes
from tersor.passes.sites import in_words

ACTIVATION_ZERO = 128
"""Zero point of symmetric activations: they are stored as uint8, which is what integer products multiply."""


@dataclass(frozen=True)
class Decoded:
    """An operand that is read through `dequantize`: its node, and the codes, scale and zero point it is made from."""

    node: fx.Node
    codes: fx.Node
    scale: fx.Node
    zero: fx.Node | float | None

    @property
    def axis(self) -> int | None:
        return self.node.kwargs.get("axis")

    @property
    def group(self) -> int | None:
        return self.node.kwargs.get("group")


def decoded(operand: object) -> Decoded | None:
    """How an operand is decoded; None when it is not."""
    if not is_call(operand, "dequantize"):
        return None
    codes, scale, zero = (*operand.args, None)[:3]
    return Decoded(operand, codes, scale, zero)


def number(function: Function, value: fx.Node | float | None) -> float | None:
    """A zero point or scale that is one number known now (none is 0); None when it is not."""
    if value is None:
        return 0.0
    if not isinstance(value, fx.Node):
        return float(value)
    tensor = function.parameter(value)
    return None if tensor is None or tensor.numel() != 1 else float(tensor)


def bias_of(linear: fx.Node) -> fx.Node | None:
    """The bias operand of a linear layer, where it has one."""
    return linear.args[2] if len(linear.args) > 2 else None


def matrix(function: Function, linear: fx.Node) -> torch.Tensor | None:
    """What a layer multiplies with, decoded where it is stored in codes; None where it is computed otherwise."""
    weight = linear.args[1]
    if decoded(weight) is None:
        return function.parameter(weight)
    parts = [function.parameter(part) if isinstance(part, fx.Node) else part for part in weight.args]
    computed = any(part is None and given is not None for part, given in zip(parts, weight.args, strict=True))
    return None if computed else weight.target(*parts, **weight.kwargs)


SMALLEST_TABLE = 1 << 16
"""Bytes of a table of embeddings from which on it is worth storing in fewer bits."""


def small_table(embedding: fx.Node, smallest: int = SMALLEST_TABLE) -> str | None:
    """Why a table of embeddings stays as it is for its size; None where it does not."""
    table = embedding.args[1].meta["value"]
    return (
        f"its {table.shape[0]} rows take {human_bytes(table.bytes)} only" if table.bytes < smallest else None
    )


Readers = Mapping[str, Sequence[fx.Node]]
"""Parameter names -> the nodes that read them, in all functions."""


def readers(program: Program) -> Readers:
    """Who reads each parameter."""
    found: dict[str, list[fx.Node]] = defaultdict(list)
    for _, node in program.nodes():
        if node.op == "get_attr":
            found[node.target].extend(node.users)
    return found


def drop_unread(program: Program) -> None:
    """Takes out parameters that nothing reads any more."""
    for function in program.functions.values():
        function.erase_dead(*function.graph.find_nodes(op="get_attr"))
    program.drop_unused_parameters()


def plain_weight(function: Function, layer: fx.Node, readers: Readers, *beside: str) -> torch.Tensor | str:
    """The weight of a linear layer, or table of an embedding, that can be quantized; or the reason why it cannot.

    ``beside``: operations that may read it, too.
    """
    weight = layer.args[1]
    if decoded(weight):
        return "its weight is stored in codes already"
    tensor = function.parameter(weight)
    if tensor is None:
        return "its weight is computed"
    if tensor.dtype != torch.float32:
        return f"its weight is {tensor.dtype}, not float32"
    for user in readers[weight.target]:
        if not is_call(user, layer.target.name, *beside):
            return f"its weight is also read by {in_words(user)}"
    return tensor
