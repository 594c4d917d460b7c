"""The layout of caches: [batch, room, heads * size], as attention reads them.

Models keep keys and values as [batch, heads, room, size]. A state begins as zeros, so its layout is free; stored with
merged heads, it is what attention takes, and a call moves the slices that it writes instead of the whole cache.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from tersor.ir.dims import Dim
from tersor.ir.matching import is_call
from tersor.ir.program import Builder, Function, Program
from tersor.ir.value import Value

_SWAP = (0, 2, 1, 3)


def merge_heads_of_states(program: Program, settle: Callable[[Program], None]) -> None:
    """Stores states [B, H, S, D] that are written along S with merged heads, if less data then has to be moved.

    ``settle`` simplifies a program; how much its permutes move afterwards tells.
    """
    names = [name for name, value in program.states.items() if value.rank == 4 and _is_cache(program, name)]
    if not names:
        return
    tried = program.copy()
    for name in names:
        merge_heads_of_state(tried, name)
    settle(tried)
    if _moved(tried) < _moved(program):
        for name in names:
            merge_heads_of_state(program, name)
        settle(program)


def _is_cache(program: Program, name: str) -> bool:
    """Whether slices are written along the third dimension, and in no other way."""
    functions = [f for f in program.functions.values() if name in f.updates]
    return bool(functions) and all(_is_written(f, name) for f in functions)


def _is_written(function: Function, name: str) -> bool:
    node, state = function.updates[name], function.state_nodes[name]
    while is_call(node, "cache_update") and _update_of(node, node.args[0]):
        node = node.args[0]
    return node is state


def _moved(program: Program) -> int:
    """Elements that permutes move when each function is called once at its largest sizes."""
    return sum(
        size.evaluate({name: r.max for name, r in function.dims.items()}) if isinstance(size, Dim) else size
        for function in program.functions.values()
        for size in (node.meta["value"].elements for node in function.calls("permute"))
    )


def merged_heads(value: Value) -> Value | None:
    """[B, H, S, D] as [B, S, H*D]; None for another rank."""
    if value.rank != 4:
        return None
    batch, heads, room, size = value.shape
    return Value(value.dtype, (batch, room, heads * size))


def merge_heads_of_state(program: Program, name: str) -> None:
    """Stores a state [B, H, S, D] as [B, S, H*D]; every function computes what it did before."""
    for function in program.functions.values():
        if name in function.states:
            _rewrite(function, name, program.states[name])
    program.states[name] = merged_heads(program.states[name])


def _is_handed_out(node: fx.Node, output: fx.Node, name: str) -> bool:
    """Whether a value is a result, or the next value of another state than ``name``."""
    results, updates = output.args
    return any(r is node for r in results) or any(n is node for s, n in updates.items() if s != name)


def _update_of(user: fx.Node, node: fx.Node) -> bool:
    """Whether a user writes slices along the third dimension into this value."""
    return (
        is_call(user, "cache_update")
        and user.args[0] is node
        and user.all_input_nodes.count(node) == 1
        and user.kwargs["dim"] % 4 == 2
    )


def _rewrite(function: Function, name: str, old: Value) -> None:
    batch, heads, room, size = old.shape
    state, updates = function.state_nodes[name], function.updates
    new_of: dict[fx.Node, fx.Node] = {state: state}
    order = {node: i for i, node in enumerate(function.graph.nodes)}

    def split(build: Builder, x: fx.Node) -> fx.Node:
        return build.permute(build.reshape(x, shape=(batch, room, heads, size)), dims=_SWAP)

    def merge(build: Builder, x: fx.Node) -> fx.Node:
        length = x.meta["value"].shape[2]
        return build.reshape(build.permute(x, dims=_SWAP), shape=(batch, length, heads * size))

    users = {state: list(state.users)}
    state.meta["value"] = merged_heads(old)
    stack = [state]
    while stack:
        node = stack.pop()
        others = []
        for user in users[node]:
            if _update_of(user, node):
                build = function.builder(before=user)
                new = build.cache_update(new_of[node], merge(build, user.args[1]), user.args[2], dim=1)
                new_of[user], users[user] = new, list(user.users)
                stack.append(user)
            elif user.op != "output" or _is_handed_out(node, user, name):
                others.append(user)
        if others:
            view = split(function.builder(before=min(others, key=order.__getitem__)), new_of[node])
            for user in others:
                user.replace_input_with(node, view)
    if name in updates:
        last = updates[name]
        function.set_update(name, new_of[last] if last in new_of else merge(function.builder(), last))
    function.erase_dead(*(node for node in new_of if node is not state))
