"""The rules of a well-formed program; the pass manager checks them after every pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

from torch import fx

from tersor.errors import ProgramError, TersorError
from tersor.ir.dialect import Op
from tersor.ir.dims import Dim, Shape, evaluate_shape, shape_symbols
from tersor.ir.program import Function, Program, Range, infer, is_state, state_problem
from tersor.ir.value import Value


def verify(program: Program) -> None:
    """Checks structure, metadata and parameters of every function.

    Raises:
        ProgramError: listing every violation found, each with its node and where that came from.
    """
    problems = [
        f"function {name!r} calls itself {function.name!r}"
        for name, function in program.functions.items()
        if name != function.name
    ]
    problems += [f"state {n!r}: {p}" for n, value in program.states.items() if (p := state_problem(value))]
    problems += [p for function in program.functions.values() for p in _problems(program, function)]
    if problems:
        listed = "\n".join(f"  - {p}" for p in problems[:20])
        more = f"\n  ... and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise ProgramError(f"the program is not well formed ({len(problems)} violations):\n{listed}{more}")


def describe(node: fx.Node) -> str:
    """A node's name with its provenance, for messages."""
    origin = [f"{k} {node.meta[k]}" for k in ("site", "module", "source", "made_by") if node.meta.get(k)]
    return f"%{node.name}" + (f" ({', '.join(origin)})" if origin else "")


def negative_at(number: int | Dim, dims: Mapping[str, Range]) -> dict[str, int] | None:
    """Sizes, each an end of its range, for which a number over named dimensions is negative; None: there are none."""
    names = sorted(shape_symbols((number,)))
    for extremes in product(*((dims[n].min, dims[n].max) for n in names)):
        sizes = dict(zip(names, extremes, strict=True))
        if evaluate_shape((number,), sizes)[0] < 0:
            return sizes
    return None


def _problems(program: Program, function: Function) -> list[str]:
    where, found = f"function {function.name!r}", []
    if function.parameters is not program.parameters:
        found.append(f"{where} reads another program's parameters")
    if function.states and function.declared is not program.states:
        found.append(f"{where} has another program's states")
    nodes = function.nodes
    if not nodes or [n for n in nodes if n.op == "output"] != nodes[-1:]:
        return [*found, f"{where} has no output node at its end"]
    if not all(isinstance(r, fx.Node) for r in function.results):
        return [*found, f"{where}: the results are {function.results}, not a tuple of nodes"]
    if len(function.outputs) != len(function.results) or len(set(function.outputs)) != len(function.outputs):
        found.append(f"{where}: {len(function.results)} results, output names {list(function.outputs)}")
    names = Counter((is_state(n), n.target) for n in nodes if n.op == "placeholder")
    found += [
        f"{where} has {count} {'states' if state else 'inputs'} called {name!r}"
        for (state, name), count in names.items()
        if count > 1
    ]
    found += _update_problems(function, where)
    seen: set[fx.Node] = set()
    for node in nodes:
        if any(operand not in seen for operand in node.all_input_nodes):
            found.append(f"{describe(node)} reads a value that is defined later")
        seen.add(node)
        if problem := _node_problem(function, node):
            found.append(f"{describe(node)}: {problem}")
    bound = {
        str(d)
        for n in nodes
        if n.op == "placeholder" and not is_state(n)
        for d in _shape(n)
        if isinstance(d, Dim) and d.is_symbol
    }
    for name in sorted(frozenset().union(*map(_symbols, nodes)) & function.dims.keys() - bound):
        found.append(f"{where}: {name!r} is alone in no input's shape, so its size cannot be known")
    found += [
        f"{where}: the example has size {size} for {name!r}, outside its range"
        for name, size in function.example.items()
        if name not in function.dims or not function.dims[name].min <= size <= function.dims[name].max
    ]
    sites = Counter(n.meta["site"] for n in nodes if n.meta.get("site"))
    found += [f"site {site!r} names {count} nodes" for site, count in sites.items() if count > 1]
    return found


def _update_problems(function: Function, where: str) -> Iterator[str]:
    """Each update is the new value of a state that the function has, of the same dtype and shape."""
    nodes, updates = function.state_nodes, function.output_node.args[1:]
    if updates and not (len(updates) == 1 and isinstance(updates[0], Mapping)):
        yield f"{where}: behind the results stands {updates}, not a mapping from states to their new values"
        return
    for name, new in function.updates.items():
        if name not in nodes:
            yield f"{where} updates the state {name!r}, which it does not have (add_state)"
        elif not isinstance(new, fx.Node):
            yield f"{where} updates the state {name!r} with {new}, which is not a node"
        elif new.meta.get("value") != nodes[name].meta.get("value"):
            yield (
                f"{where} updates the state {name!r}, {nodes[name].meta.get('value')}, "
                f"with {new.meta.get('value')} from {describe(new)}"
            )


def _shape(node: fx.Node) -> Shape:
    value = node.meta.get("value")
    return value.shape if isinstance(value, Value) else ()


def _symbols(node: fx.Node) -> frozenset[str]:
    """The named dimensions in a node's shape and attributes."""

    def dims(x: Any) -> Iterator[Dim]:
        if isinstance(x, Dim):
            yield x
        elif isinstance(x, list | tuple):
            for item in x:
                yield from dims(item)

    return shape_symbols((*_shape(node), *dims(tuple(node.kwargs.values()))))


def _node_problem(function: Function, node: fx.Node) -> str | None:
    value: Any = node.meta.get("value")
    if node.op == "output":
        return None
    if not isinstance(value, Value):
        return "has no value metadata"
    if undeclared := _symbols(node) - function.dims.keys():
        return f"uses dimensions without a range: {', '.join(sorted(undeclared))}"
    if is_state(node):
        if node.target not in function.declared:
            return f"is the state {node.target!r}, which the program does not have"
        known = function.declared[node.target]
        return None if known == value else f"says {value}, the state is {known}"
    if node.op == "placeholder":
        return None
    if node.op == "get_attr":
        if node.target not in function.parameters:
            return f"reads the parameter {node.target!r}, which does not exist"
        actual = function.parameters[node.target].value
        return None if actual == value else f"says {value}, the parameter is {actual}"
    if node.op != "call_function" or not isinstance(node.target, Op):
        return f"{node.op} of {node.target} is not a dialect operation"
    try:
        inferred = infer(node.target, node.args, node.kwargs)
    except TersorError as error:
        return error.what + (f" ({error.why})" if error.why else "")
    if inferred != value:
        return f"says {value}, its operands give {inferred}"
    return _outside(function, node) if node.target.name == "slice" else None


def _outside(function: Function, node: fx.Node) -> str | None:
    """Nothing at run time finds a slice that leaves its dimension."""
    given = node.target.bind(node.args, node.kwargs)
    total = _shape(given["x"])[given["dim"]]
    end = total if given["end"] is None else given["end"]
    for spare in (given["start"], total - end):
        sizes = negative_at(spare, function.dims)
        if sizes is not None:
            at = ", ".join(f"{name} = {size}" for name, size in sizes.items())
            return f"reads {given['start']} to {end} of {total}, which is outside at {at or 'all sizes'}"
    return None
