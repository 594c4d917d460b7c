"""Runs a function in plain torch: the reference that every pass and every kernel is held against."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from tersor.errors import InputError
from tersor.ir.dims import Dim
from tersor.ir.program import Function
from tersor.ir.value import Value

Observer = Callable[[fx.Node, torch.Tensor], None]


def bind_dims(values: Mapping[str, Value], inputs: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Sizes of the named dimensions, read off the inputs.

    Raises:
        InputError: an input is missing, or its rank or size disagrees with the signature.
    """
    sizes: dict[str, int] = {}
    for name, value in values.items():
        if name not in inputs:
            raise InputError(f"input {name!r} is missing", fix=f"give {name}: {value}")
        shape = tuple(inputs[name].shape)
        if len(shape) != value.rank:
            raise InputError(f"input {name!r} has shape {list(shape)}", why=f"the signature says {value}")
        for actual, dim in zip(shape, value.shape, strict=True):
            expected = sizes.setdefault(str(dim), actual) if isinstance(dim, Dim) and dim.is_symbol else dim
            if isinstance(expected, int) and actual != expected:
                raise InputError(f"input {name!r} has shape {list(shape)}", why=f"the signature says {value}")
    return sizes


def run(
    function: Function,
    inputs: Mapping[str, torch.Tensor],
    *,
    observe: Observer | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, torch.Tensor]:
    """Evaluates a function: tensors by input name -> tensors by output name.

    Args:
        observe: called with each operation node and its result, in order.
        dtype: computes in this float type instead of the parameters' own (float64 for exact comparisons).

    Raises:
        InputError: the inputs do not fit the signature.
    """
    sizes = bind_dims(function.inputs, inputs)
    values: dict[fx.Node, Any] = {}
    last_use = {operand: node for node in function.graph.nodes for operand in node.all_input_nodes}

    def convert(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor

    for node in function.graph.nodes:
        if node.op == "placeholder":
            values[node] = convert(inputs[node.target])
        elif node.op == "get_attr":
            values[node] = convert(function.parameters[node.target].tensor)
        elif node.op == "call_function":
            operands = fx.map_arg(node.args, values.__getitem__)
            attributes = {k: resolve(v, sizes) for k, v in node.kwargs.items()}
            if dtype is not None and attributes.get("dtype") == "float32":
                attributes["dtype"] = str(dtype).removeprefix("torch.")
            values[node] = node.target(*operands, **attributes)
            if observe is not None:
                observe(node, values[node])
        else:
            results = fx.map_arg(node.args[0], values.__getitem__)
            return dict(zip(function.outputs, results, strict=True))
        for operand in node.all_input_nodes:
            if last_use[operand] is node:
                del values[operand]
    raise AssertionError("a function ends with an output node")


def resolve(attribute: Any, sizes: Mapping[str, int]) -> Any:
    """An attribute with symbolic dimensions replaced by their sizes."""
    if isinstance(attribute, Dim):
        return attribute.evaluate(sizes)
    if isinstance(attribute, list | tuple):
        return tuple(resolve(a, sizes) for a in attribute)
    return attribute
