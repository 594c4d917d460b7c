"""Inputs made from a signature: for comparing two versions of a function and for timing it, never for accuracy."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from tersor.ir.dims import evaluate_shape
from tersor.ir.program import Function

_PASSES_IDS_ON = {"reshape", "slice", "expand", "permute", "cast", "index_select", "gather", "concat"}


def sample_inputs(
    function: Function, sizes: Mapping[str, int] | None = None, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Tensors that fit the signature at the given sizes of the named dimensions (default: each range's end).

    Floats are normal; integers that select rows of a table are valid positions; other integers and booleans are
    ones followed by zeros along the last dimension, a different number in each row, like a padding mask.
    """
    sizes = {name: r.max for name, r in function.dims.items()} | dict(sizes or {})
    generator = torch.Generator().manual_seed(seed)
    inputs = {}
    for node in function.graph.find_nodes(op="placeholder"):
        value = node.meta["value"]
        shape = evaluate_shape(value.shape, sizes)
        rows = _selected_rows(node)
        if value.is_float:
            made = torch.randn(shape, generator=generator)
        elif rows is not None:
            made = torch.randint(0, rows, shape, generator=generator)
        else:
            made = _ragged(shape, generator)
        inputs[node.target] = made.to(value.torch_dtype)
    return inputs


def _selected_rows(node: fx.Node) -> int | None:
    """The smallest number of rows among the tables that an integer input selects from."""
    found, stack, seen = [], [node], set()
    while stack:
        current = stack.pop()
        for user in current.users:
            if user in seen or user.op != "call_function":
                continue
            seen.add(user)
            if user.target.name == "embedding" and user.args[0] is current:
                found.append(user.args[1].meta["value"].shape[0])
            elif user.target.name in ("index_select", "gather") and user.args[1] is current:
                found.append(user.args[0].meta["value"].shape[user.kwargs["dim"]])
            elif user.target.name in _PASSES_IDS_ON:
                stack.append(user)
    sizes = [rows for rows in found if isinstance(rows, int)]
    return min(sizes) if sizes else None


def _ragged(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Rows of 1 1 ... 1 0 ... 0 with at least one 1; the first row is all ones."""
    if not shape:
        return torch.ones(())
    length = shape[-1]
    lengths = torch.randint((length + 1) // 2, length + 1, shape[:-1], generator=generator).clamp(min=1)
    if lengths.numel():
        lengths.view(-1)[0] = length
    return torch.arange(length) < lengths.unsqueeze(-1)
