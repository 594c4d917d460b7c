"""Inputs made from a signature: for comparing two versions of a function and for timing it, never for accuracy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set

import torch
from torch import fx

from tersor.ir.dims import Dim, evaluate_shape
from tersor.ir.program import Function

Sizes = Mapping[str, int]
_PASSES_IDS_ON = {"reshape", "slice", "expand", "permute", "cast", "index_select", "gather", "concat"}
_PASSES_POSITIONS_ON = _PASSES_IDS_ON | {"add", "sub"}


def sample_inputs(
    function: Function, sizes: Mapping[str, int] | None = None, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Tensors that fit the signature at the given sizes of the named dimensions (default: each range's end).

    Floats are normal; integers that select rows of a table are valid positions; other integers and booleans are
    ones followed by zeros along the last dimension, a different number in each row, like a padding mask. Positions
    to write in a state are consecutive, and lie in it.
    """
    return _samples(function.input_nodes, _all_sizes(function, sizes), seed)


def sample_states(function: Function, sizes: Sizes | None = None, seed: int = 0) -> dict[str, torch.Tensor]:
    """The function's states as earlier calls could have left them, made as `sample_inputs` makes inputs."""
    return _samples(list(function.state_nodes.values()), _all_sizes(function, sizes), seed + 1)


def _all_sizes(function: Function, sizes: Sizes | None) -> dict[str, int]:
    return {name: r.max for name, r in function.dims.items()} | dict(sizes or {})


def _samples(nodes: list[fx.Node], sizes: Sizes, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for node in nodes:
        value = node.meta["value"]
        shape = evaluate_shape(value.shape, sizes)
        rows, places = _selected_rows(node, sizes), _first_positions(node, sizes)
        if value.is_float:
            tensor = torch.randn(shape, generator=generator)
        elif places is not None:
            length = shape[-1] if shape else 1
            places = places if rows is None else max(min(places, rows - length + 1), 1)
            first = torch.randint(0, places, shape[:-1] + (1,) * bool(shape), generator=generator)
            tensor = (first + torch.arange(length)) if shape else first
        elif rows is not None:
            tensor = torch.randint(0, rows, shape, generator=generator)
        else:
            tensor = _ragged(shape, generator)
        made[node.target] = tensor.to(value.torch_dtype)
    return made


def _selected_rows(node: fx.Node, sizes: Sizes) -> int | None:
    """The smallest number of rows among the tables that an integer input selects from."""
    found = []
    for current, user in _readers(node, _PASSES_IDS_ON):
        if user.target.name == "embedding" and user.args[0] is current:
            found.append(user.args[1].meta["value"].shape[0])
        elif user.target.name in ("index_select", "gather") and user.args[1] is current:
            found.append(user.args[0].meta["value"].shape[user.kwargs["dim"]])
    return min(evaluate_shape(tuple(found), sizes), default=None)


def _first_positions(node: fx.Node, sizes: Sizes) -> int | None:
    """How many first positions there are from which all that is written with an integer input fits its state."""
    found = []
    for current, user in _readers(node, _PASSES_POSITIONS_ON):
        if user.target.name == "cache_update" and user.args[2] is current:
            room, length = (a.meta["value"].shape[user.kwargs["dim"]] for a in user.args[:2])
            room, length = (d.evaluate(sizes) if isinstance(d, Dim) else d for d in (room, length))
            found.append(room - length + 1)
    return max(min(found), 1) if found else None


def _readers(node: fx.Node, passing: Set[str]) -> Iterator[tuple[fx.Node, fx.Node]]:
    """(value, operation that reads it) for the node and what operations that pass it on make of it."""
    stack, seen = [node], set()
    while stack:
        current = stack.pop()
        for user in current.users:
            if user in seen or user.op != "call_function":
                continue
            seen.add(user)
            yield current, user
            if user.target.name in passing:
                stack.append(user)


def _ragged(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Rows of 1 1 ... 1 0 ... 0 with at least one 1; the first row is all ones."""
    if not shape:
        return torch.ones(())
    length = shape[-1]
    lengths = torch.randint((length + 1) // 2, length + 1, shape[:-1], generator=generator).clamp(min=1)
    if lengths.numel():
        lengths.view(-1)[0] = length
    return torch.arange(length) < lengths.unsqueeze(-1)
