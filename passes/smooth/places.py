"""Where a value may be scaled and shifted without changing the function, found from the graph.

At such a place v becomes (v - z) / s: what makes it absorbs 1/s and -z/s, the linear layers that read it take s into
the columns of their weights and W z into their biases, and what else reads it gets v back by a multiplication (and an
addition). The kinds:

* ``norm``: only linear layers read a norm; its gamma and beta absorb.
* ``residual``: others read it too, such as the residual stream of a post-norm model, and get it back.
* ``value``: values under an attention, up to its output projection; the rows of a softmax sum to one.
* ``hidden``: what goes through relu, or the factor of a product that is no activation, up to the next layer.
* ``activation``: the result of another element-wise operation, such as GELU, through which no scale passes. It is
  multiplied by 1/s, which costs next to nothing where it is made, in the epilogue of the layer before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import fx

from tersor.ir import Function
from tersor.ir.matching import is_call
from tersor.passes.fold.attentions import (
    VALUE,
    every_query_sees_a_key,
    head_sizes,
    output_projection,
    projection,
)
from tersor.passes.sites import in_words, site_of
from tersor.passes.weights import (
    Affine,
    Derivation,
    WeightChange,
    is_plain_linear,
    operand,
    parameter,
)

Absorb = Callable[[WeightChange, torch.Tensor, torch.Tensor | None], None]


@dataclass(frozen=True, eq=False)
class Place:
    """A value that may become (value - z) / s.

    Attributes:
        kind: see the module.
        function: where it is.
        anchor: the node that reports name.
        value: the node whose value it is.
        consumers: the linear layers that read it.
        shiftable: whether z may be other than 0.
        tied: for each channel the channel whose s and z it must share; None where all are free.
        absorb: adds to a change what happens to the maker and the other readers, by s and z (None: no shift).
    """

    kind: str
    function: Function
    anchor: fx.Node
    value: fx.Node
    consumers: tuple[fx.Node, ...]
    shiftable: bool
    absorb: Absorb
    tied: torch.Tensor | None = None

    def largest(self, channels: torch.Tensor) -> torch.Tensor:
        """For each channel the largest number among those tied to it."""
        if self.tied is None:
            return channels
        most = torch.full_like(channels, -torch.inf).scatter_reduce(0, self.tied, channels, "amax")
        return most[self.tied]

    @property
    def weights(self) -> list[torch.Tensor]:
        """Weights [outputs, channels] of the consumers."""
        return [parameter(self.function, linear, 1) for linear in self.consumers]

    def change(self, s: torch.Tensor, z: torch.Tensor | None, reason: str) -> WeightChange:
        """What happens to the program for these s (none 0) and z (None: no shift), exactly."""
        change = WeightChange(self.function, self.anchor, reason)
        for linear, weight in zip(self.consumers, self.weights, strict=True):
            change.derived[linear, 1] = Derivation(("columns", *s.tolist()), lambda w: w.double() * s)
            if z is not None:
                change.add_bias(linear, weight.double() @ z)
        self.absorb(change, s, z)
        return change


def norm_place(function: Function, norm: fx.Node) -> Place | str:
    """The place at a norm's result; otherwise what stands in the way."""
    gamma, beta = operand(norm, 1), operand(norm, 2)
    for name, given in (("gamma", gamma), ("beta", beta)):
        if given is not None and function.parameter(given) is None:
            return f"its {name} is computed, not a parameter"
    consumers = tuple(u for u in norm.users if _reads_alone(function, u, norm))
    if not consumers:
        return "no linear layer with plain weights reads it"
    kind = "norm" if len(consumers) == len(norm.users) else "residual"
    shiftable = norm.target.name == "layer_norm"

    def absorb(change: WeightChange, s: torch.Tensor, z: torch.Tensor | None) -> None:
        name = gamma.target.removesuffix(".weight") if gamma is not None else f"{site_of(norm)}.smooth"
        if gamma is not None:
            change.derived[norm, 1] = Derivation(("over", *s.tolist()), lambda g: g.double() / s)
        else:
            change.created[norm, 1] = (f"{name}.weight", 1 / s)
        if beta is not None:
            shift = 0.0 if z is None else z
            key = ("shifted over", *([] if z is None else z.tolist()), *s.tolist())
            change.derived[norm, 2] = Derivation(key, lambda b: (b.double() - shift) / s)
        elif z is not None:
            change.created[norm, 2] = (f"{name}.bias", -z / s)
        if kind == "residual":
            _give_back(change, function, norm, consumers, name, s, z)

    return Place(kind, function, norm, norm, consumers, shiftable, absorb)


def value_place(function: Function, attention: fx.Node) -> Place | str:
    """The place between a value projection and the output projection; otherwise what stands in the way."""
    value, out = projection(function, attention, VALUE), output_projection(function, attention)
    if isinstance(value, str) or isinstance(out, str):
        return value if isinstance(value, str) else out
    if value.between:
        return f"between the value projection and the attention lies {value.between[0].target.name}"
    heads, groups, size = attention.kwargs["heads"], attention.kwargs["kv_heads"], head_sizes(attention)[1]
    first = torch.arange(groups * size).reshape(groups, size) + torch.arange(groups).unsqueeze(1) * (
        (heads // groups - 1) * size
    )  # the channels of each group's first head
    tied = first.repeat_interleave(heads // groups, 0).reshape(-1)

    def absorb(change: WeightChange, s: torch.Tensor, z: torch.Tensor | None) -> None:
        rows = first.reshape(-1)
        _absorb_in_rows(change, function, value.linear, s[rows], None if z is None else z[rows])

    shiftable = every_query_sees_a_key(attention)
    return Place(
        "value", function, out, attention, (out,), shiftable, absorb, tied if groups < heads else None
    )


def hidden_place(function: Function, down: fx.Node) -> Place | str | None:
    """The place before a linear layer whose input is made element by element; otherwise what stands in the way, or None
    where the input is an attention's, a norm's or another layer's.

    relu(x / s) = relu(x) / s for positive s, and a product scales with either factor: there an earlier layer's rows or
    the factor absorb. No other operation lets a scale through: what it makes gets a factor.
    """
    value = down.args[0]
    if not is_call(value) or is_call(value, "attention", "layer_norm", "rms_norm", "linear"):
        return None
    consumers = tuple(u for u in value.users if _reads_alone(function, u, value))
    if down not in consumers:
        return None
    kind, absorb = "hidden", _absorbing(function, value, consumers)
    if isinstance(absorb, str):
        if value.target.elementwise is None:
            return absorb
        kind, absorb = "activation", _factor(value, consumers)
    return Place(kind, function, down, value, consumers, False, absorb)


def _absorbing(function: Function, value: fx.Node, consumers: tuple[fx.Node, ...]) -> Absorb | str:
    """How what is before a value absorbs a scale, through relu and products; otherwise what stands in the way."""
    node, path = value, []
    while is_call(node, "relu", "mul"):
        if others := [u for u in node.users if u not in (consumers if node is value else path)]:
            return f"its input is also read by {in_words(others[0])}"
        path.append(node)
        if is_call(node, "relu"):
            node = node.args[0]
            continue
        if (index := next(_vectors(function, node), None)) is not None:
            return _in_factor(node, index)
        factors = [a for a in node.args if isinstance(a, fx.Node) and _same_width(a, node)]
        linears = [f for f in factors if is_plain_linear(function, f) and factors.count(f) == 1]
        if not linears:
            return "no factor of its input is a linear layer with plain weights"
        node = linears[-1]
    if not is_plain_linear(function, node):
        return f"its input comes through {in_words(node)}, through which no scale passes"
    if others := [u for u in node.users if u not in path]:
        return f"{site_of(node)} is also read by {in_words(others[0])}"

    def absorb(change: WeightChange, s: torch.Tensor, z: torch.Tensor | None) -> None:
        _absorb_in_rows(change, function, node, s, z)

    return absorb


def _in_factor(multiply: fx.Node, index: int) -> Absorb:
    """The factor that a product has already takes 1/s in."""

    def absorb(change: WeightChange, s: torch.Tensor, z: torch.Tensor | None) -> None:
        change.derived[multiply, index] = Derivation(("over", *s.tolist()), lambda t: t.double() / s)

    return absorb


def _factor(value: fx.Node, consumers: tuple[fx.Node, ...]) -> Absorb:
    """The linear layers read the value times 1/s."""

    def absorb(change: WeightChange, s: torch.Tensor, z: torch.Tensor | None) -> None:
        spared = frozenset(value.users).difference(consumers)
        change.affine[value] = Affine(spared, f"{site_of(consumers[0])}.input.smooth", 1 / s)

    return absorb


def _reads_alone(function: Function, user: fx.Node, value: fx.Node) -> bool:
    """Whether a reader is a linear layer that multiplies the value with plain weights."""
    return is_plain_linear(function, user) and user.args[0] is value and value not in user.args[1:]


def _same_width(node: fx.Node, other: fx.Node) -> bool:
    shape = node.meta["value"].shape
    return bool(shape) and shape[-1] == other.meta["value"].shape[-1]


def _absorb_in_rows(
    change: WeightChange, function: Function, linear: fx.Node, s: torch.Tensor, z: torch.Tensor | None
) -> None:
    """The rows of a linear layer over s, its bias less z over s."""
    change.derived[linear, 1] = Derivation(("rows over", *s.tolist()), lambda w: w.double() / s.unsqueeze(1))
    shift = torch.zeros_like(s) if z is None else z
    if parameter(function, linear, 2) is not None:
        key = ("shifted over", *shift.tolist(), *s.tolist())
        change.derived[linear, 2] = Derivation(key, lambda b: (b.double() - shift) / s)
    elif z is not None:
        weight = linear.args[1].target
        change.created[linear, 2] = (weight.removesuffix("weight") + "bias", -z / s)


def _give_back(
    change: WeightChange,
    function: Function,
    norm: fx.Node,
    consumers: tuple[fx.Node, ...],
    name: str,
    s: torch.Tensor,
    z: torch.Tensor | None,
) -> None:
    """The readers other than linear layers get v' s + z; a factor that is there from an earlier time takes s in."""
    others = [user for user in norm.users if user not in consumers]
    multiply = others[0]
    factor = None
    if len(others) == 1 and is_call(multiply, "mul") and norm in multiply.args:
        factor = next(_vectors(function, multiply), None)
    if factor is None:
        change.affine[norm] = Affine(frozenset(consumers), f"{name}.residual", s, z)
        return
    given = parameter(function, multiply, factor).double()
    change.derived[multiply, factor] = Derivation(("times", *s.tolist()), lambda t: t.double() * s)
    if z is None:
        return
    users = list(multiply.users)
    added = next(_vectors(function, users[0]), None) if len(users) == 1 and is_call(users[0], "add") else None
    if added is None:
        change.affine[multiply] = Affine(frozenset(), f"{name}.residual", shift=z * given)
    else:
        key = ("plus", *(z * given).tolist())
        change.derived[users[0], added] = Derivation(key, lambda t: t.double() + z * given)


def _vectors(function: Function, node: fx.Node) -> Iterator[int]:
    """Positions at which a product or a sum has a parameter with a number per channel."""
    width = node.meta["value"].shape[-1:]
    for index in (0, 1):
        tensor = function.parameter(node.args[index])
        if tensor is not None and tensor.shape == width:
            yield index
