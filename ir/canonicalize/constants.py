"""What depends on no input is computed once, here: constants, and tables over one dynamic dimension."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

import torch
from torch import fx

from tersor.errors import CaptureError, InputError
from tersor.ir.canonicalize.affine import is_stored
from tersor.ir.dims import Dim, evaluate_shape
from tersor.ir.interpreter import execute
from tersor.ir.matching import is_call
from tersor.ir.parameters import Parameter
from tersor.ir.program import Builder, Function
from tersor.ir.verifier import describe

SMALL = 1 << 16  # bytes that a new constant may always have
LARGEST_TABLE = 1 << 28  # bytes of a table that is tried at all

# These are as good as stored: they take no memory, or their operand (codes, a quarter of the bytes) should be stored.
_CHEAP = ("full", "expand", "arange", "dequantize")

# What these make of a parameter is still the parameter: a part or a view of it, or 1 + weight as Gemma's norms have it.
_RENDITIONS = ("permute", "reshape", "slice", "cast", "add", "sub", "mul", "div", "neg")


# torch's name of the module that computes a parameter of its owner: conv.parametrizations.weight.0
_PARAMETRIZED = re.compile(r"(.*)\.parametrizations\.(\w+)\.\d+")


def fold_constants(
    function: Function, spare: Collection[fx.Node] = (), *, may_grow: bool = False
) -> list[str]:
    """Evaluates every maximal value that depends on no input; returns a note for each that stays and why.

    A value of fixed shape becomes a parameter if that is small, or no larger than the parameters it makes unused,
    or in any case where it ``may_grow``.
    A value over one dynamic dimension becomes a table for the dimension's maximum and a slice of it, after its
    values at smaller sizes have been found to be a prefix of the table.
    """
    notes: list[str] = []
    made: dict[str, str] = {}
    free = _input_free(function)
    pending = list(_frontier(function, free))
    seen = set(pending)
    while pending:
        node = pending.pop(0)
        if node.op != "call_function" or node in spare or is_stored(node):
            continue
        cone = _cone(node)
        if any(n.op == "placeholder" for n in cone):
            continue
        symbols = sorted(frozenset().union(*(_symbols(n) for n in cone)))
        if not symbols:
            reason = _fold(function, node, cone, may_grow, made)
        elif len(symbols) == 1:
            reason = _tabulate(function, node, cone, symbols[0], made)
        else:
            reason = f"it depends on several dimensions: {', '.join(symbols)}"
        if reason:
            notes.append(f"%{node.name} is computed at run time: {reason}")
        if reason and symbols:  # what it is made from may be constant
            below = dict.fromkeys(n for operand in node.all_input_nodes for n in _made_from(operand))
            pending += [n for n in below if n not in seen]
            seen.update(below)
    return notes


def _input_free(function: Function) -> set[fx.Node]:
    free: set[fx.Node] = set()
    for node in function.nodes:
        if node.op == "get_attr" or (is_call(node) and all(n in free for n in node.all_input_nodes)):
            free.add(node)
    return free


def _frontier(function: Function, free: set[fx.Node]) -> list[fx.Node]:
    """Input-free values that something else reads; below a cheap one, what it is made from."""
    read = (n for n in function.nodes if n in free and any(u not in free for u in n.users))
    return list(dict.fromkeys(made for n in read for made in _made_from(n)))


def _made_from(node: fx.Node) -> list[fx.Node]:
    """The node, or below cheap ones what they are made from."""
    if not is_call(node, *_CHEAP):
        return [node]
    return [made for operand in node.all_input_nodes for made in _made_from(operand)]


def _cone(node: fx.Node) -> list[fx.Node]:
    """The node and everything it is computed from, in order."""
    members, stack = {node}, [node]
    while stack:
        for operand in stack.pop().all_input_nodes:
            if operand not in members:
                members.add(operand)
                stack.append(operand)
    return [n for n in node.graph.nodes if n in members]


def _symbols(node: fx.Node) -> frozenset[str]:
    def walk(x: object) -> Iterable[str]:
        if isinstance(x, Dim):
            yield from x.symbols
        elif isinstance(x, list | tuple):
            for y in x:
                yield from walk(y)

    shape = node.meta["value"].shape
    return frozenset(walk((shape, tuple(node.kwargs.values()))))


def _evaluate(function: Function, cone: list[fx.Node], sizes: dict[str, int]) -> torch.Tensor:
    values: dict[fx.Node, torch.Tensor] = {}
    try:
        with torch.no_grad():
            execute(function, cone, values, sizes, keep={cone[-1]})
    except (InputError, RuntimeError) as error:  # a stored index that is outside of its table
        raise CaptureError(
            "a constant of the model cannot be computed",
            where=describe(cone[-1]),
            why=error.why if isinstance(error, InputError) else f"{type(error).__name__}: {error}",
        ) from error
    return values[cone[-1]]


def _freed(function: Function, cone: list[fx.Node]) -> int:
    """Bytes of the parameters that nobody else reads."""
    members = set(cone)
    return sum(
        function.parameters[n.target].tensor.nbytes
        for n in cone
        if n.op == "get_attr" and all(u in members for u in n.users)
    )


def _store(
    build: Builder, node: fx.Node, cone: list[fx.Node], tensor: torch.Tensor, made: dict[str, str]
) -> fx.Node:
    """A parameter named after the only one it is made from, else after the module that computes it.

    What every layer computes anew (tables of angles) is stored once; ``made`` has the names by content.
    """
    stored = [n.target for n in cone if n.op == "get_attr"]
    if len(stored) == 1 and all(is_call(n, *_RENDITIONS) for n in cone if n.op != "get_attr"):
        return build.parameter(stored[0], tensor)
    new = Parameter(tensor)
    if new.digest in made:
        return build.read(made[new.digest])
    module = node.meta.get("module")
    made_by = _PARAMETRIZED.fullmatch(module or "")
    name = ".".join(made_by.groups()) if made_by else ".".join(filter(None, (module, node.name)))
    read = build.parameter(name, new)
    made[new.digest] = read.target
    return read


def _fold(
    function: Function, node: fx.Node, cone: list[fx.Node], may_grow: bool, made: dict[str, str]
) -> str | None:
    if not may_grow and node.meta["value"].bytes > max(SMALL, _freed(function, cone)):
        return f"as a constant it would take {node.meta['value'].bytes} bytes"
    largest = max((n.meta["value"].bytes for n in cone if n.op != "get_attr"), default=0)
    if largest > max(LARGEST_TABLE, _freed(function, cone)):
        return f"to compute it takes {largest} bytes"
    build = function.builder(before=node)
    new = _store(build, node, cone, _evaluate(function, cone, {}), made)
    function.replace(node, new)
    return None


def _tabulate(
    function: Function, node: fx.Node, cone: list[fx.Node], symbol: str, made: dict[str, str]
) -> str | None:
    bounds, value = function.dims[symbol], node.meta["value"]
    axes = [i for i, d in enumerate(value.shape) if isinstance(d, Dim)]
    if any(value.shape[i] != Dim.symbol(symbol) for i in axes):
        return f"its shape {value} is not the dimension itself"
    largest = max(_bytes_at(n, symbol, bounds.max) for n in cone)
    if largest > LARGEST_TABLE:
        return f"its table would need {largest} bytes"
    table = _evaluate(function, cone, {symbol: bounds.max})
    for size in {bounds.min, (bounds.min + bounds.max) // 2}:
        part = table
        for axis in axes:
            part = part.narrow(axis, 0, size)
        if not _equal(_evaluate(function, cone, {symbol: size}), part):
            return f"its values depend on the size of {symbol}"
    build = function.builder(before=node)
    if all(_equal(table, table.narrow(axis, 0, 1).expand_as(table)) for axis in axes):
        for axis in axes:  # repeated only
            table = table.narrow(axis, 0, 1)
        new = _store(build, node, cone, table.clone(), made)
        function.replace(node, build.expand(new, shape=value.shape))
        return None
    new = _store(build, node, cone, table, made)
    for axis in axes:
        new = build.slice(new, dim=axis, start=0, end=Dim.symbol(symbol))
    function.replace(node, new)
    return None


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal up to the last bit or two, which depend on how torch groups elements into vector lanes."""
    if not a.is_floating_point():
        return torch.equal(a, b)
    return torch.allclose(
        a, b, rtol=4 * torch.finfo(a.dtype).eps, atol=torch.finfo(a.dtype).eps, equal_nan=True
    )


def _bytes_at(node: fx.Node, symbol: str, size: int) -> int:
    value = node.meta["value"]
    total = value.torch_dtype.itemsize
    for d in evaluate_shape(value.shape, {symbol: size}):
        total *= d
    return total
