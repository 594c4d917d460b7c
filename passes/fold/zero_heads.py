"""Removes attention heads that contribute nothing."""

from __future__ import annotations

import torch
from torch import fx

from tersor.ir import Function, Program
from tersor.passes.base import Equivalent, Pass, PassResult
from tersor.passes.context import Context
from tersor.passes.fold.attentions import (
    KEY,
    MASK,
    QUERY,
    VALUE,
    Projection,
    bias_of,
    head_sizes,
    output_projection,
    projection,
)
from tersor.passes.registry import register
from tersor.passes.weights import WeightChange, apply_changes, operand, parameter


@register("fold.zero_heads")
class FoldZeroHeads(Pass):
    """attention over 12 heads, 3 of which the output projection ignores  ->  attention over 9.

    Before:  %a = attention(%q, %k, %v, heads=12, kv_heads=12);  %y = linear(%a, @o)      q [B, T, 768], o [768, 768]
    After:   %a = attention(%q, %k, %v, heads=9, kv_heads=9);    %y = linear(%a, @o')     q [B, T, 576], o' [768, 576]

    A head is zero when its columns of the output projection are, or when its values are (rows and bias of the value
    projection). With grouped queries a group goes when all its heads are zero; of the groups that stay, each loses as
    many zero heads as the group with the fewest has, since groups must stay equal; zero heads beyond that stay and
    the report says so. Each layer keeps its own number of heads, at least one. A rotary embedding or a norm per head
    may lie between projection and attention.

    Legal when the attention alone reads queries, keys and values, a linear layer alone reads the attention, and the
    mask is the same for all heads.

    Source: exact; pruned heads are such (Michel et al. 2019).
    """

    numerics = Equivalent(1e-5)
    stage = "fold"
    acts_on = ("attention", "linear")
    forbids = {"quantized"}
    invalidates = {"masked"}  # with heads of fewer than four channels, groups of four shift

    def run(self, program: Program, context: Context) -> PassResult:
        result, changes = PassResult(), []
        for function, attention in self.select(program, "attention"):
            projections = [projection(function, attention, role) for role in (QUERY, KEY, VALUE)]
            out = output_projection(function, attention)
            if obstacle := next((p for p in (*projections, out) if isinstance(p, str)), None):
                result.skip(attention, obstacle)
                continue
            heads, groups, stuck = _remaining(
                _zero_heads(function, attention, projections[VALUE].linear, out)
            )
            if stuck:
                listed = ", ".join(map(str, stuck))
                result.skip(attention, f"heads {listed} are zero but stay: their groups would become unequal")
            if len(heads) == attention.kwargs["heads"]:
                if not stuck:
                    result.skip(attention, "none of its heads is zero")
                continue
            change = _change(function, attention, projections, out, heads, groups)
            if isinstance(change, str):
                result.skip(attention, change)
            else:
                changes.append(change)
        apply_changes(self, program, changes, result)
        return result


def _zero_heads(function: Function, attention: fx.Node, value: fx.Node, out: fx.Node) -> torch.Tensor:
    """Which heads contribute nothing: booleans [groups, heads per group]."""
    heads, groups = attention.kwargs["heads"], attention.kwargs["kv_heads"]
    size = head_sizes(attention)[1]
    ignored = (parameter(function, out, 1) == 0).reshape(-1, heads, size).all(0).all(1)
    valueless = (parameter(function, value, 1) == 0).reshape(groups, -1).all(1)
    if (bias := bias_of(function, value)) is not None:
        valueless &= (bias == 0).reshape(groups, size).all(1)
    return ignored.reshape(groups, -1) | valueless.unsqueeze(1)


def _remaining(zero: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Indices of the heads and groups that stay, and the zero heads among them that cannot go."""
    per_group = zero.shape[1]
    stay = ~zero.all(1)
    if not stay.any():
        stay[0] = True
    groups = stay.nonzero().squeeze(1)
    removable = min(int(zero[groups].sum(1).min()), per_group - 1)
    heads, stuck = [], []
    for group in groups.tolist():
        members = [group * per_group + i for i in range(per_group)]
        zeros = [h for h, is_zero in zip(members, zero[group].tolist(), strict=True) if is_zero]
        heads += [h for h in members if h not in zeros[:removable]]
        if not zero[group].all():
            stuck += zeros[removable:]
    return torch.tensor(heads), groups, stuck


def _change(
    function: Function,
    attention: fx.Node,
    projections: list[Projection],
    out: fx.Node,
    heads: torch.Tensor,
    groups: torch.Tensor,
) -> WeightChange | str:
    old_heads, old_groups = attention.kwargs["heads"], attention.kwargs["kv_heads"]
    mask = operand(attention, MASK)
    if mask is not None and mask.meta["value"].shape[1] != 1:
        return "its mask differs from head to head"
    key_size, value_size = head_sizes(attention)
    change = WeightChange(function, attention, f"{old_heads - len(heads)} of {old_heads} heads removed")
    for role, kept, old, size in (
        (QUERY, heads, old_heads, key_size),
        (KEY, groups, old_groups, key_size),
        (VALUE, groups, old_groups, value_size),
    ):
        channels = _channels(kept, size)
        change.select((projections[role].linear, 1), channels, 0)
        change.select((projections[role].linear, 2), channels, 0)
        for node in projections[role].between:
            attributes = _with_heads(node, old, len(kept), size)
            if isinstance(attributes, str):
                return attributes
            change.attributes[node] = attributes
    change.select((out, 1), _channels(heads, value_size), 1)
    change.attributes[attention] = {"heads": len(heads), "kv_heads": len(groups)}
    return change


def _channels(heads: torch.Tensor, size: int) -> torch.Tensor:
    return (heads.unsqueeze(1) * size + torch.arange(size)).reshape(-1)


def _with_heads(node: fx.Node, old: int, new: int, size: int) -> dict[str, object] | str:
    """Attributes of a node between projection and attention for another number of heads."""
    if node.target.name == "rotary_embedding":
        return {"heads": new}
    if node.target.name == "reshape":
        shape = tuple(node.kwargs["shape"])
        if shape[-2:] == (old, size):
            return {"shape": (*shape[:-2], new, size)}
        if shape[-1] == old * size:
            return {"shape": (*shape[:-1], new * size)}
    elif node.args[0].meta["value"].shape[-2:] == (old, size):
        return {}  # a norm of each head by itself
    return f"{node.target.name} between a projection and the attention does not keep heads apart"
