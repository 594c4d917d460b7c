"""Codes inside a program as results of a second function, so that compiled code can be followed step by step.

The kernels are those of the function itself: what an integer product reads lies in memory anyway. Only the code that
calls them is made twice, which takes a few per cent of the time of compiling.
"""

from __future__ import annotations

from collections.abc import Container

from torch import fx

from tersor.ir.matching import is_call
from tersor.ir.program import Function, Program


def with_observers(program: Program) -> tuple[Program, dict[str, Function]]:
    """A copy that has for each function which rounds to codes for integer products another one, that gives these codes
    behind the same results; and these functions by the names of those that they observe.
    """
    made, observers = program.copy(), {}
    for name, function in program.functions.items():
        codes, own = rounded(function), made.functions[name]
        if not codes:
            continue
        other = own.copy(made.parameters, made.states)
        other.name = _free(f"{name}_observed", made.functions)
        nodes = dict(zip(function.graph.nodes, other.graph.nodes, strict=True))
        results = dict(zip(other.outputs, other.results, strict=True))
        names = [_free(f"codes.{i}", results) for i in range(len(codes))]
        other.set_outputs(results | {n: nodes[code] for n, code in zip(names, codes, strict=True)})
        made.functions[other.name] = observers[name] = other
    return made, observers


def _free(name: str, taken: Container[str]) -> str:
    while name in taken:
        name += "_"
    return name


READERS = ("integer_linear", "grouped_integer_linear", "integer_attention")


def rounded(function: Function) -> list[fx.Node]:
    """The codes that integer products read, and computed zero points: what rounds, and lies in memory for others."""
    return [
        node
        for node in function.calls("quantize", "round")
        if any(is_call(user, *READERS) for user in node.users)
        or (node.target.name == "round" and node.meta["value"].rank == 0)
    ]
