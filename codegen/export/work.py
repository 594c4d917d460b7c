"""What a function's products cost, in numbers that outlive the program: for estimates of an exported model's time."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import fx

from tersor.ir.costs import node_cost
from tersor.ir.matching import is_call
from tersor.ir.program import Function


def described(function: Function) -> list[dict[str, Any]]:
    """Operations that multiply, equal ones together: count, dtype, products (an expression), bytes of weights."""
    rows: Counter[tuple[str, str, int]] = Counter()
    for node in function.calls():
        products = str(node_cost(node).macs)
        if products != "0":
            sources = [_source(operand) for operand in node.all_input_nodes]
            weights = {
                n.target: function.parameters[n.target].tensor.nbytes for n in sources if n.op == "get_attr"
            }
            dtype = _dtype(sources)
            if is_call(node, "attention", "integer_attention"):
                if node.target.name == "integer_attention":
                    dtype = "int8"
                else:  # on the cores that estimates are for, bf16 is multiplied in f32
                    dtype = "float16" if node.kwargs.get("products") == "float16" else "float32"
            rows[dtype, products, sum(weights.values())] += 1
    keys = ("dtype", "products", "weights")
    return [{"count": count, **dict(zip(keys, row, strict=True))} for row, count in rows.items()]


def _source(node: fx.Node) -> fx.Node:
    """What a cast reads, which is what the kernel reads."""
    return node.args[0] if node.op == "call_function" and node.target.name == "cast" else node


def _dtype(operands: list[fx.Node]) -> str:
    """The kind of the products of the first two operands."""
    dtypes = {operand.meta["value"].dtype for operand in operands[:2]}
    if dtypes <= {"int8", "uint8"}:
        return "int8"
    for narrow in ("bfloat16", "float16"):
        if dtypes == {narrow}:
            return narrow
    return "float32"
