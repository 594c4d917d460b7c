"""Removes neurons that contribute nothing, or always the same."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import fx

from tersor.ir import Function, Program
from tersor.passes.base import Equivalent, Pass, PassResult
from tersor.passes.context import Context
from tersor.passes.registry import register
from tersor.passes.sites import in_words
from tersor.passes.weights import WeightChange, apply_changes, is_plain_linear, parameter


@register("fold.zero_neurons")
class FoldZeroNeurons(Pass):
    """act(x W1 + b1) W2 + b2 without the neurons whose row of W1 or column of W2 is zero.

    Before:  %h = gelu(linear(%x, @w1, @b1));    %y = linear(%h, @w2, @b2)      w1 [3072, 768], w2 [768, 3072]
    After:   %h = gelu(linear(%x, @w1', @b1'));  %y = linear(%h, @w2', @b2')    w1' [3000, 768], w2' [768, 3000]

    A neuron whose weights in W2 are zero goes. One whose value does not depend on x (its row of W1 is zero) has the
    constant value act(b1), which moves into b2. Between the two layers may lie any element-wise operations, and
    several layers may meet there: in silu(x G) * (x U) a neuron is zero when its row of U is, or when its row of G is
    and silu(0) = 0. Each layer keeps its own number of neurons, at least one.

    Legal when nothing else reads what lies between, and the activations are finite (0 * inf is not 0).

    Source: exact; structured pruning leaves such neurons behind (Michel et al. 2019 for heads, ZipLM).
    """

    numerics = Equivalent(1e-5)
    stage = "fold"
    acts_on = ("linear",)
    forbids = {"quantized"}
    invalidates = {"masked"}  # groups of four channels shift

    def run(self, program: Program, context: Context) -> PassResult:
        result, pending = PassResult(), self.select(program)
        while pending:
            # In a chain of layers one place's result is the next one's neurons: neighbours wait for the next round.
            changes, touched, waiting = [], set(), []
            for function, down in pending:
                change = _planned(function, down)
                if isinstance(change, str):
                    result.skip(down, change)
                elif change is not None and touched & change.nodes:
                    waiting.append((function, down))
                elif change is not None:
                    changes.append(change)
                    touched |= change.nodes
            apply_changes(self, program, changes, result)
            pending = waiting
        return result


@dataclass
class _Hidden:
    """What lies between linear layers and the one that reads their neurons.

    Attributes:
        linears: the layers that make the neurons.
        steps: the element-wise operations between, in order.
        vectors: operands of them that have one number per neuron.
    """

    linears: list[fx.Node] = field(default_factory=list)
    steps: list[fx.Node] = field(default_factory=list)
    vectors: list[tuple[fx.Node, int]] = field(default_factory=list)


def _hidden(function: Function, down: fx.Node) -> _Hidden | str | None:
    """The neurons that ``down`` reads; None when its input has no neurons; otherwise what stands in the way."""
    width, hidden, obstacle = parameter(function, down, 1).shape[1], _Hidden(), None
    stack, seen = [down.args[0]], set()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if is_plain_linear(function, node):
            hidden.linears.append(node)
            continue
        if node.op != "call_function" or node.target.elementwise is None:
            obstacle = f"its input is mixed with {in_words(node)}, which no linear layer makes"
            continue
        hidden.steps.append(node)
        for index, argument in enumerate(node.args):
            constant = function.parameter(argument)
            if (
                constant is not None
                and constant.numel() == constant.shape[-1:].numel() == width
                and constant.ndim
            ):
                hidden.vectors.append((node, index))
            elif isinstance(argument, fx.Node) and (constant is None or constant.numel() != 1):
                stack.append(argument)
    if not hidden.linears:
        return None
    if any(linear.meta["value"].shape[-1] != width for linear in hidden.linears):
        return "its input is broadcast from fewer neurons"
    inside = {*hidden.linears, *hidden.steps}
    for node in inside:
        for user in node.users:
            if user not in inside and not (user is down and down.args[0] is node):
                return f"its input is also read by {in_words(user)}"
    order = {node: i for i, node in enumerate(function.graph.nodes)}
    hidden.steps.sort(key=order.__getitem__)
    return obstacle or hidden


def _planned(function: Function, down: fx.Node) -> WeightChange | str | None:
    """What to do at a layer; None when its input has no neurons; otherwise why nothing is done."""
    if not is_plain_linear(function, down):
        return None
    hidden = _hidden(function, down)
    if not isinstance(hidden, _Hidden):
        return hidden
    weight = parameter(function, down, 1)
    constant, values = _constant_neurons(function, hidden, down.args[0], weight.shape[1])
    unread = (weight == 0).all(0)
    keep = ~(constant | unread)
    removed = int((~keep).sum())
    if not removed:
        return "none of its neurons is zero"
    if not keep.any():
        keep[0] = True  # a layer of no width has no shape
        removed -= 1
        if not removed:
            return "its only neuron stays"
    kept = keep.nonzero().squeeze(1)
    moved = constant & ~unread & ~keep
    change = WeightChange(function, down, f"{removed} of {len(keep)} neurons removed")
    for linear in hidden.linears:
        change.select((linear, 1), kept, 0)
        change.select((linear, 2), kept, 0)
    for slot in hidden.vectors:
        change.select(slot, kept, parameter(function, *slot).ndim - 1)
    change.select((down, 1), kept, 1)
    change.add_bias(down, weight[:, moved].double() @ values[moved])
    return change


def _constant_neurons(
    function: Function, hidden: _Hidden, result: fx.Node, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which neurons have the same value for every input, and these values."""
    known: dict[fx.Node, torch.Tensor] = {}
    value: dict[fx.Node, torch.Tensor] = {}
    for linear in hidden.linears:
        bias = parameter(function, linear, 2)
        known[linear] = (parameter(function, linear, 1) == 0).all(1)
        value[linear] = torch.zeros(width, dtype=torch.float64) if bias is None else bias.double()
    for step in hidden.steps:
        arguments, flags = [], []
        for argument in step.args:
            tensor = function.parameter(argument)
            if tensor is not None:
                argument = tensor.reshape(-1).double() if tensor.is_floating_point() else tensor.reshape(-1)
            elif isinstance(argument, fx.Node):
                flags.append(known[argument])
                argument = value[argument]
            arguments.append(argument)
        known[step] = torch.stack(flags).all(0)
        if step.target.name == "mul":
            # a known zero decides a product whatever the other factor
            for node in step.args:
                if isinstance(node, fx.Node) and node in known:
                    known[step] = known[step] | (known[node] & (value[node] == 0))
        computed = step.target(*arguments, **step.kwargs)
        value[step] = computed.double() if computed.is_floating_point() else computed
    finite = torch.isfinite(value[result])
    return known[result] & finite, torch.where(finite, value[result].double(), 0.0)
