"""A model that computes in 16 bits becomes one that computes in float32, of the same weights.

Its values are rounded less than they were. What only rounds to 16 bits or stores them, and computes in float32, says so
on purpose (the recipes bf16 and fp16 do) and stays.
"""

from __future__ import annotations

from torch import fx

from tersor.errors import ProgramError
from tersor.ir.matching import is_call
from tersor.ir.program import Program, infer
from tersor.ir.value import Value

HALF = ("float16", "bfloat16")

MOVES = ("cast", "embedding", "reshape", "permute", "slice", "concat", "expand")
"""Operations whose results may have 16 bits: they compute nothing."""


def widen(program: Program) -> list[str]:
    """Inputs, states, parameters and everything between become float32, where states have 16 bits, what is computed of
    inputs and states, or what comes in or goes out without a cast.

    Raises:
        ProgramError: an operation gives 16 bits of operands in float32, and has no attribute ``dtype`` that says so.
    """
    found = _dtypes(program)
    if not found:
        return []
    for name, value in program.states.items():
        program.states[name] = _wide(value)
    for name, parameter in list(program.parameters.items()):
        if parameter.value.dtype in HALF:
            program.parameters[name] = parameter.tensor.float()
    for function in program.functions.values():
        for node in function.nodes:
            if node.op == "call_function":
                _infer(node)
            elif node.op != "output":
                node.meta["value"] = _wide(node.meta["value"])
    return [f"computed in float32, not in {' and '.join(sorted(found))}"]


def _dtypes(program: Program) -> set[str]:
    """The types of 16 bits that are not only stored, or rounded to."""
    found = {value.dtype for value in program.states.values()}
    for function in program.functions.values():
        ends = [x for x in function.input_nodes if not all(is_call(user, "cast") for user in x.users)]
        # what a damaged file returns may be nothing; the verifier says so
        ends += [x for x in function.results if isinstance(x, fx.Node) and not is_call(x, "cast")]
        found |= {node.meta["value"].dtype for node in ends}
        varying: set[fx.Node] = set()
        for node in function.nodes:
            if node.op == "placeholder" or varying.intersection(node.all_input_nodes):
                varying.add(node)
                if node.op == "call_function" and node.target.name not in MOVES:
                    found.add(node.meta["value"].dtype)
    return found.intersection(HALF)


def _infer(node: fx.Node) -> None:
    if node.kwargs.get("dtype") in HALF:
        node.kwargs = {**node.kwargs, "dtype": "float32"}
    value = infer(node.target, node.args, node.kwargs)
    if value.dtype in HALF:
        raise ProgramError(
            f"operation {node.target.name!r} gives {value.dtype}, of a model that is computed in float32",
            why="its attributes other than dtype= are not known to say so",
            fix="call the attribute dtype, or compile the model in float32: model.float()",
        )
    node.meta["value"] = value


def _wide(value: Value) -> Value:
    return Value("float32", value.shape) if value.dtype in HALF else value
