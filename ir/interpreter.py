"""Runs a function in plain torch: the reference that every pass and every kernel is held against."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Set
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_aggregate

from tersor.errors import InputError
from tersor.ir.dims import Dim
from tersor.ir.program import Function
from tersor.ir.value import DTYPE_NAMES, DTYPES, Value
from tersor.ir.verifier import describe

Observer = Callable[[fx.Node, torch.Tensor], torch.Tensor | None]
"""Sees an operation's result; a tensor that it returns takes the result's place."""


def bind_dims(values: Mapping[str, Value], inputs: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Sizes of the named dimensions, read off the inputs.

    Raises:
        InputError: an input is missing, or its rank or size disagrees with the signature.
    """
    sizes: dict[str, int] = {}
    pairs: list[tuple[str, int, Any]] = []  # input, actual size, declared size
    for name, value in values.items():
        if name not in inputs:
            raise InputError(f"input {name!r} is missing", fix=f"give {name}: {value}")
        if inputs[name].ndim != value.rank:
            raise _misfit(name, values, inputs)
        for actual, dim in zip(inputs[name].shape, value.shape, strict=True):
            pairs.append((name, actual, dim))
            if isinstance(dim, Dim) and dim.is_symbol:
                sizes.setdefault(str(dim), actual)
    for name, actual, dim in pairs:
        if actual != resolve(dim, sizes):
            raise _misfit(name, values, inputs)
    return sizes


def _misfit(name: str, values: Mapping[str, Value], inputs: Mapping[str, torch.Tensor]) -> InputError:
    given = {k: list(inputs[k].shape) for k in values if k in inputs}
    return InputError(
        f"input {name!r} has shape {given.pop(name)}",
        why=f"the signature says {values[name]}"
        + (f"; the other inputs have shapes {given}" if given else ""),
        fix="give inputs of these shapes, where dimensions of one name are of one size",
    )


def run(
    function: Function,
    inputs: Mapping[str, torch.Tensor],
    states: MutableMapping[str, torch.Tensor] | None = None,
    *,
    observe: Observer | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, torch.Tensor]:
    """Evaluates a function: tensors by input name -> tensors by output name.

    Args:
        states: tensors by state name, as `Program.zero_states` gives them. New values replace those in the mapping;
            the tensors themselves are left alone. None: zeros, as in a first call, and the new values are dropped.
        observe: called with each operation node and its result, in order; may return another result.
        dtype: computes in this float type instead of the program's own ones (float64 for exact comparisons).

    Raises:
        InputError: the inputs or states do not fit the signature, or integers in them are positions outside of what
            they select from.
    """
    values, sizes = bind(function, inputs, states)
    execute(
        function, function.nodes[:-1], values, sizes, keep=set(function.ends), observe=observe, dtype=dtype
    )
    return collect(function, values, states)


def bind(
    function: Function, inputs: Mapping[str, torch.Tensor], states: Mapping[str, torch.Tensor] | None
) -> tuple[dict[fx.Node, torch.Tensor], dict[str, int]]:
    """The values of inputs and states by node, and the sizes of the named dimensions.

    Raises:
        InputError: they do not fit the signature.
    """
    sizes = bind_dims(function.inputs, inputs)
    values = {n: inputs[n.target] for n in function.input_nodes}
    for name, node in function.state_nodes.items():
        value: Value = node.meta["value"]
        if states is None:
            values[node] = torch.zeros(value.shape, dtype=value.torch_dtype)
        elif name not in states or tuple(states[name].shape) != value.shape:
            given = f"has shape {list(states[name].shape)}" if name in states else "is missing"
            raise InputError(f"state {name!r} {given}", fix=f"give {value}: see Program.zero_states")
        else:
            values[node] = states[name]
    return values, sizes


def collect(
    function: Function,
    values: Mapping[fx.Node, torch.Tensor],
    states: MutableMapping[str, torch.Tensor] | None,
) -> dict[str, torch.Tensor]:
    """The results by name; new values of states replace those in the mapping."""
    if states is not None:
        states.update({name: values[node] for name, node in function.updates.items()})
    return {name: values[node] for name, node in zip(function.outputs, function.results, strict=True)}


def execute(
    function: Function,
    nodes: list[fx.Node],
    values: dict[fx.Node, torch.Tensor],
    sizes: Mapping[str, int],
    *,
    keep: Set[fx.Node],
    observe: Observer | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Evaluates a run of nodes in place: ``values`` holds what they read from before, and at the end what is
    in ``keep`` and was there or was made here; everything else is freed at its last use.

    Raises:
        InputError: an operation reads or writes at a position that its tensor does not have.
    """
    last_use = {operand: node for node in nodes for operand in (node, *node.all_input_nodes)}

    def convert(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor

    for node in nodes:
        if node.op == "placeholder":
            values[node] = convert(values[node])
        elif node.op == "get_attr":
            values[node] = convert(function.parameters[node.target].tensor)
        else:
            operands = fx.map_arg(node.args, values.__getitem__)
            attributes = {k: resolve(v, sizes) for k, v in node.kwargs.items()}
            if dtype is not None and node.meta["value"].is_float:
                operands = map_aggregate(operands, _integers_to(dtype, operands))
                if DTYPES.get(attributes.get("dtype"), torch.bool).is_floating_point:
                    attributes["dtype"] = DTYPE_NAMES[dtype]
            values[node] = convert(_compute(node, operands, attributes))
            if observe is not None and (other := observe(node, values[node])) is not None:
                values[node] = other
        for operand in (node, *node.all_input_nodes):
            if last_use[operand] is node and operand not in keep:
                del values[operand]


def _integers_to(dtype: torch.dtype, operands: tuple[Any, ...]) -> Callable[[Any], Any]:
    """Lets an operation that makes floats of integers alone make them in ``dtype``; torch would use float32."""
    tensors: list[Any] = []
    map_aggregate(operands, tensors.append)
    alone = not any(isinstance(t, torch.Tensor) and t.is_floating_point() for t in tensors)

    def widened(operand: Any) -> Any:
        integers = isinstance(operand, torch.Tensor) and operand.dtype != torch.bool
        return operand.to(dtype) if alone and integers else operand

    return widened


def _compute(node: fx.Node, operands: tuple[Any, ...], attributes: Mapping[str, Any]) -> torch.Tensor:
    try:
        return node.target(*operands, **attributes)
    except (IndexError, RuntimeError) as error:
        # torch has no class of its own for a position that is outside of a tensor
        if isinstance(error, RuntimeError) and "out of bounds" not in str(error):
            raise
        raise InputError(
            f"{node.target.name} reads or writes outside of a tensor", where=describe(node), why=str(error)
        ) from error


def resolve(attribute: Any, sizes: Mapping[str, int]) -> Any:
    """An attribute with symbolic dimensions replaced by their sizes."""
    if isinstance(attribute, Dim):
        return attribute.evaluate(sizes)
    if isinstance(attribute, list | tuple):
        return tuple(resolve(a, sizes) for a in attribute)
    return attribute
