"""Merges low-rank adapters into the layers that they adapt."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from tersor.ir import Function, Program
from tersor.ir.matching import is_call, is_number
from tersor.passes.base import Equivalent, Pass, PassResult
from tersor.passes.context import Context
from tersor.passes.registry import register
from tersor.passes.sites import in_words, site_of
from tersor.passes.weights import Derivation, WeightChange, apply_changes, is_plain_linear, parameter


@register("fold.lora")
class FoldLora(Pass):
    """x W^T + scale (x A^T) B^T  ->  x (W + scale B A)^T.

    Before:  %y = linear(%x, @w, @b);  %a = linear(%x, @a);  %d = linear(%a, @up)
             %s = mul(%d, 2.0);        %z = add(%y, %s)
    After:   %z = linear(%x, @w', @b)                                      w' = w + 2 up a

    Biases of the adapter move along. Several adapters of one layer merge one after the other, in any order and with or
    without a scale.

    Legal when all weights are parameters, both ways read the same value, nothing else reads what lies between, the
    adapter is thinner than the layer, and the layer's weight is not read elsewhere without the adapter.

    Source: Hu et al. 2021 (LoRA), section 4.1: no latency after merging.
    """

    numerics = Equivalent(1e-5)
    stage = "fold"
    acts_on = ("linear", "add")
    forbids = {"quantized"}
    invalidates = {"factorized", "masked"}

    def run(self, program: Program, context: Context) -> PassResult:
        result, refused = PassResult(), set()
        while found := self._adapters(program, refused, result):
            changes = [adapter.change() for adapter in found]
            merged = {change.anchor for change in apply_changes(self, program, changes, result)}
            for adapter in found:
                if adapter.base in merged:
                    adapter.function.replace(adapter.total, adapter.base)
                else:
                    refused.add(adapter.total)
        return result

    def _adapters(self, program: Program, refused: set[fx.Node], result: PassResult) -> list[Adapter]:
        """One adapter of each layer; the sums that cannot be merged are refused, with the reason."""
        found: dict[fx.Node, Adapter] = {}
        for function, total in self.select(program, "add"):
            adapter = _adapter(function, total) if total not in refused else None
            if isinstance(adapter, str):
                refused.add(total)
                result.skip(total, adapter)
            elif adapter is not None:
                found.setdefault(adapter.base, adapter)
        return list(found.values())


@dataclass(frozen=True)
class Adapter:
    """``total = base(x) + scale * up(down(x))``."""

    function: Function
    total: fx.Node
    base: fx.Node
    down: fx.Node
    up: fx.Node
    scale: float

    def change(self) -> WeightChange:
        """The layer with the adapter in it."""
        read = self.function.parameters
        rank, outputs = self.down.meta["value"].shape[-1], self.up.meta["value"].shape[-1]
        down, up = (parameter(self.function, node, 1).double() for node in (self.down, self.up))
        change = WeightChange(self.function, self.base, f"an adapter of rank {rank} merged")
        key = ("plus", self.scale, *(read[node.args[1].target].digest for node in (self.down, self.up)))
        change.derived[self.base, 1] = Derivation(key, lambda w: w.double() + self.scale * (up @ down))
        shift = torch.zeros(outputs, dtype=torch.float64)
        for bias, matrix in (
            (parameter(self.function, self.down, 2), up),
            (parameter(self.function, self.up, 2), None),
        ):
            if bias is not None:
                shift = shift + (bias.double() if matrix is None else matrix @ bias.double())
        change.add_bias(self.base, self.scale * shift)
        return change


def _adapter(function: Function, total: fx.Node) -> Adapter | str | None:
    """The adapter in a sum; None where there is none; otherwise what stands in the way."""
    for base, other in (total.args, total.args[::-1]):
        if not is_call(base, "linear") or not isinstance(other, fx.Node):
            continue
        scale, up = _scaled(function, other)
        if not is_call(up, "linear") or not is_call(up.args[0], "linear"):
            continue
        down = up.args[0]
        if down.args[0] is not base.args[0]:
            continue
        wide, narrow = base.meta["value"].shape[-1], down.meta["value"].shape[-1]
        if not narrow < min(wide, base.args[1].meta["value"].shape[1]):
            continue
        for node in (base, up, down):
            if not is_plain_linear(function, node):
                return f"the weight or bias of {in_words(node)} is computed, not a parameter"
        if other.meta["value"].shape != base.meta["value"].shape:
            return "the adapter's result is broadcast"
        inside = {other, up, down, total}
        for node in (base, other, up, down):
            if outside := [user for user in node.users if user not in inside]:
                return f"{site_of(node)} is also read by {in_words(outside[0])}"
        return Adapter(function, total, base, down, up, scale)
    return None


def _scaled(function: Function, node: fx.Node) -> tuple[float, fx.Node]:
    """A number and what it multiplies."""
    if is_call(node, "mul"):
        for factor, value in (node.args, node.args[::-1]):
            if is_number(factor) and isinstance(value, fx.Node):
                return float(factor), value
            tensor = function.parameter(factor)
            if tensor is not None and tensor.numel() == 1 and isinstance(value, fx.Node):
                return tensor.item(), value
    return 1.0, node
