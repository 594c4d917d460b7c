"""A model that computes in 16 bits becomes one that computes in float32, of the same weights.

Its values are rounded less than they were. What only rounds to 16 bits or stores them, and computes in float32, says so
on purpose (the recipes bf16 and fp16 do) and stays.
"""

from __future__ import annotations

from torch import fx

from tersor.ir.program import Program, infer
from tersor.ir.value import Value

HALF = ("float16", "bfloat16")

MOVES = (
    "cast",
    "embedding",
    "reshape",
    "permute",
    "slice",
    "concat",
    "expand",
    "index_select",
    "gather",
    "pad",
)
"""Operations whose results have 16 bits without being computed in them."""


def widen(program: Program) -> list[str]:
    """Inputs, states, parameters and everything between become float32, where something is computed in 16 bits."""
    computed = {node.meta["value"].dtype for _, node in program.nodes() if _computes_in_half(node)}
    if not computed:
        return []
    for name, value in program.states.items():
        program.states[name] = _wide(value)
    for name, parameter in list(program.parameters.items()):
        if parameter.value.dtype in HALF:
            program.parameters[name] = parameter.tensor.float()
    for function in program.functions.values():
        for node in function.nodes:
            if node.op == "call_function":
                if node.kwargs.get("dtype") in HALF:
                    node.kwargs = {**node.kwargs, "dtype": "float32"}
                node.meta["value"] = infer(node.target, node.args, node.kwargs)
            elif node.op != "output":
                node.meta["value"] = _wide(node.meta["value"])
    return [f"computed in float32, with the weights that the model has in {', '.join(sorted(computed))}"]


def _computes_in_half(node: fx.Node) -> bool:
    return node.op == "call_function" and node.meta["value"].dtype in HALF and node.target.name not in MOVES


def _wide(value: Value) -> Value:
    return Value("float32", value.shape) if value.dtype in HALF else value
