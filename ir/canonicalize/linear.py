"""Products with a weight as `linear`, biases taken in, fused projections taken apart."""

from __future__ import annotations

import torch
from torch import fx

from tersor.ir.canonicalize.layout import MOVES, Layout, arrange, trace
from tersor.ir.dims import product
from tersor.ir.matching import Match, P, Rule, is_call
from tersor.ir.program import Builder

# Operations that lead from a projection to the attention that reads it, by the same operand position.
_ON_THE_WAY = (
    *MOVES,
    "slice",
    "rotary_embedding",
    "mul",
    "div",
    "add",
    "expand",
    "layer_norm",
    "rms_norm",
    "cast",
)
_ROLES = {0: "query", 1: "key", 2: "value"}


def _is_matrix(m: Match) -> str | None:
    if m.value("weight").rank != 2:
        return f"the parameter has rank {m.value('weight').rank}"
    return None if m.value("x").dtype == m.value("weight").dtype else "the types differ"


def _transposed(build: Builder, m: Match) -> fx.Node:
    """A weight that several products read (a layer that is called twice) stays one: it is stored when constants are."""
    weight = m["weight"]
    readers = [r.args[1] is weight if is_call(r, "matmul") else is_call(r, "permute") for r in weight.users]
    if len(readers) > 1 and all(readers):
        return build.linear(m["x"], build.permute(m["weight"], dims=(1, 0)))
    return build.linear(m["x"], build.parameter(m["weight"].target, m.parameter("weight").t()))


def _is_bias(m: Match) -> str | None:
    width = m.root.meta["value"].shape[-1:]
    if m.value("bias").shape != width or m.root.meta["value"].shape != m["linear"].meta["value"].shape:
        return f"{m.value('bias')} is not one number per output channel"
    return None if m.value("bias").dtype == m["linear"].meta["value"].dtype else "the types differ"


# -- fused projections


def _parts(m: Match) -> tuple[fx.Node, Layout, int] | str:
    """The projection, its layout in the sliced value and the atom of the output channels that is cut; or why not."""
    source, layout = trace(m["whole"])
    if not is_call(source, "linear"):
        return "it does not cut the output of a linear"
    weight, *bias = source.args[1:]
    function = m.function
    if any(p is not None and function.parameter(p) is None for p in (weight, *bias)):
        return "the weight is computed"
    if any(len(p.users) > 1 for p in (weight, *bias) if p is not None):
        return "the weight has other uses"
    group = layout.result[m.root.kwargs["dim"] % len(layout.result)]
    if m.root.kwargs.get("step", 1) != 1 or len(group) != 1 or group[0] not in layout.source[-1]:
        return "it does not cut output channels"
    if m.root.meta["value"].elements == 0:
        return "it takes nothing"
    if not all(isinstance(layout.sizes[a], int) for a in layout.source[-1]):
        return "the cut channels have no fixed number"
    slices = _leaves(source)
    if slices is None:
        return "the whole output is used too"
    width = source.meta["value"].shape[-1]
    rows = product(source.meta["value"].shape[:-1])
    if sum(s.meta["value"].elements // rows for s in slices) > width:
        return "the slices overlap"
    return source, layout, group[0]


def _is_part(m: Match) -> str | None:
    """A fixed part of a parameter of which nothing but such parts is read, and no element twice."""
    readers = [
        u
        for n in m.function.graph.find_nodes(op="get_attr")
        if n.target == m["whole"].target
        for u in n.users
    ]
    parts = [_range(u) if is_call(u, "slice") else None for u in readers]
    if any(p is None for p in parts):
        return "the whole parameter is read too, or a part with a dynamic size"
    if len({p[0] for p in parts}) > 1:
        return "it is cut along several axes"
    ends = sorted((start, end) for _, start, end in parts)
    if any(first[1] > second[0] for first, second in zip(ends, ends[1:], strict=False)):
        return "the parts overlap"
    return None


def _range(node: fx.Node) -> tuple[int, int, int] | None:
    axis, start = node.kwargs["dim"] % node.meta["value"].rank, node.kwargs.get("start", 0)
    length = node.meta["value"].shape[axis]
    if node.kwargs.get("step", 1) != 1 or not isinstance(start, int) or not isinstance(length, int):
        return None
    return axis, start, start + length


def _own_part(build: Builder, m: Match) -> fx.Node:
    axis, start, end = _range(m.root)
    taken = m.parameter("whole").narrow(axis, start, end - start).clone()
    role = next((r for u in m.root.users if is_call(u, "linear") and (r := _role(u))), None)
    name = m["whole"].target
    return build.parameter(_part_name(name, role) if role else name, taken)


def _leaves(source: fx.Node) -> list[fx.Node] | None:
    """The slices that a value ends in, after any reshapes; None when something else reads it."""
    found, stack = [], [source]
    while stack:
        for user in stack.pop().users:
            if is_call(user, "slice"):
                found.append(user)
            elif is_call(user, *MOVES):
                stack.append(user)
            else:
                return None
    return found


def _splits(m: Match) -> str | None:
    parts = _parts(m)
    return parts if isinstance(parts, str) else None


def _split(build: Builder, m: Match) -> fx.Node:
    source, layout, atom = _parts(m)
    channels = layout.source[-1]
    start, axis = m.root.kwargs.get("start", 0), channels.index(atom)
    size = m.root.meta["value"].shape[m.root.kwargs["dim"] % len(layout.result)]
    role = _role(m.root) or f"part_{start // size}"
    sizes = [layout.sizes[a] for a in channels]

    def part(node: fx.Node | None) -> fx.Node | None:
        if node is None:
            return None
        whole: torch.Tensor = m.function.parameter(node)
        taken = whole.reshape(*sizes, *whole.shape[1:]).narrow(axis, start, size)
        return build.parameter(_part_name(node.target, role), taken.reshape(-1, *whole.shape[1:]).clone())

    operands = [part(p) for p in source.args[1:]]
    result = build.linear(source.args[0], *operands)
    result.meta.update({k: source.meta[k] for k in ("module", "source") if k in source.meta})
    if size == 1 and len(channels) == 1:
        # a single channel leaves no atom to resize
        return build.reshape(result, shape=m.root.meta["value"].shape)
    return arrange(build, result, layout.resized(atom, size))


def _part_name(name: str, role: str) -> str:
    """attn.c_attn.weight -> attn.c_attn.query.weight; self_attn.in_proj_bias -> self_attn.in_proj.query.bias."""
    for kind in ("weight", "bias"):
        if name.endswith(kind) and (stem := name.removesuffix(kind).rstrip("._")):
            return f"{stem}.{role}.{kind}"
    return f"{name}.{role}"


def _role(node: fx.Node) -> str | None:
    """query, key or value, for a value that only attention reads, always as the same operand."""
    roles: set[str | None] = set()
    stack, seen = [node], set()
    while stack:
        here = stack.pop()
        for user in here.users:
            if is_call(user, "attention"):
                roles.update(_ROLES.get(i) for i, a in enumerate(user.args) if a is here)
            elif is_call(user, *_ON_THE_WAY) and user not in seen:
                seen.add(user)
                stack.append(user)
            elif user not in seen:
                roles.add(None)
    return roles.pop() if len(roles) == 1 else None


RULES = (
    # matmul(x, permute(W, 1 0))  ->  linear(x, W)
    Rule(
        "linear.transposed_weight",
        P.matmul(P.any("x"), P.permute(P.parameter("weight"), dims=(1, 0))),
        lambda build, m: build.linear(m["x"], m["weight"]),
        _is_matrix,
    ),
    # matmul(x, W)  ->  linear(x, W.T), transposed once, here
    Rule("linear.weight", P.matmul(P.any("x"), P.parameter("weight")), _transposed, _is_matrix),
    # linear(x, W) + b  ->  linear(x, W, b)
    Rule(
        "linear.bias",
        P.add(P.linear(P.any("x"), P.any("weight")).named("linear"), P.parameter("bias")),
        lambda build, m: build.linear(m["x"], m["weight"], m["bias"]),
        _is_bias,
    ),
)

SPLIT_RULES = (
    # W[0:n], W[n:2n], ...  ->  parameters of their own
    Rule("linear.part", P.slice(P.parameter("whole")), _own_part, _is_part),
    # slice(linear(x, W, b), 0:n), slice(..., n:2n), ...  ->  linear(x, W[0:n], b[0:n]), ...
    Rule("linear.split", P.slice(P.any("whole")), _split, _splits),
)
