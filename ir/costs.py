"""What a program costs at given sizes of its dimensions: multiply-accumulates, bytes moved, memory.

These are properties of the program, before anything is fused or scheduled: equal programs cost the same on
every machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import fx

from tersor.errors import InputError
from tersor.ir.dialect import Cost
from tersor.ir.dims import Dim
from tersor.ir.program import Function, Program, is_state
from tersor.ir.state import in_place
from tersor.ir.text import human_bytes, human_count
from tersor.ir.value import Value

# Their results are their operands' memory under another shape.
_VIEWS = {"reshape"}


@dataclass(frozen=True)
class Row:
    """One line of a table: how often, multiply-accumulates, bytes read and written."""

    count: int
    macs: int
    bytes: int


@dataclass(frozen=True)
class FunctionCost:
    """The cost of calling one function once.

    Attributes:
        sizes: the sizes of the named dimensions that this holds for.
        macs: multiply-accumulates of products (linear, matmul, attention, convolutions); the rest counts none.
        bytes: read and written if every operation runs alone.
        parameter_bytes: of the parameters it reads, tied ones once.
        state_bytes: of the states it reads or updates.
        peak_bytes: most memory that inputs, results and intermediate values need at one time, each freed at
            its last use; parameters and states, which are updated in place, not included.
        peak_node: the node that runs at that time.
        ops: totals by operation.
        sites: totals by site; operations without one count for the module they come from, or for "".
    """

    sizes: dict[str, int]
    macs: int
    bytes: int
    parameter_bytes: int
    state_bytes: int
    peak_bytes: int
    peak_node: str
    ops: dict[str, Row]
    sites: dict[str, Row]


@dataclass(frozen=True)
class CostReport:
    """The cost of each function, and of the program: each function called once, parameters and states shared."""

    functions: dict[str, FunctionCost]
    parameter_bytes: int
    state_bytes: int

    @property
    def macs(self) -> int:
        return sum(f.macs for f in self.functions.values())

    @property
    def bytes(self) -> int:
        return sum(f.bytes for f in self.functions.values())

    @property
    def peak_bytes(self) -> int:
        """The largest of the functions' activation peaks; add ``parameter_bytes`` and ``state_bytes`` for the whole."""
        return max((f.peak_bytes for f in self.functions.values()), default=0)

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, strings and integers."""
        totals = {"macs": self.macs, "bytes": self.bytes, "peak_bytes": self.peak_bytes}
        return {**totals, **asdict(self)}

    def __str__(self) -> str:
        """The totals and the table of operations of each function."""
        lines = [f"parameters: {human_bytes(self.parameter_bytes)}"]
        if self.state_bytes:
            lines.append(f"states: {human_bytes(self.state_bytes)} in each session")
        for name, function in self.functions.items():
            at = ", ".join(f"{dim} {size}" for dim, size in function.sizes.items())
            lines += [
                f"{name}" + (f" at {at}" if at else ""),
                f"  {human_count(function.macs)}MAC, {human_bytes(function.bytes)} moved, "
                f"peak of activations {human_bytes(function.peak_bytes)} at %{function.peak_node}",
                f"  {'operation':<20}{'count':>7}{'MACs':>12}{'bytes':>12}",
            ]
            rows = sorted(function.ops.items(), key=lambda item: (-item[1].macs, -item[1].bytes, item[0]))
            lines += [
                f"  {op:<20}{row.count:>7}{human_count(row.macs):>12}{human_bytes(row.bytes):>12}"
                for op, row in rows
            ]
        return "\n".join(lines)


def node_cost(node: fx.Node) -> Cost:
    """Work of one operation node, in integers or symbolic dimensions."""
    result, operands = node.meta["value"], fx.map_arg(node.args, lambda n: n.meta["value"])
    op = node.target
    macs = op.macs(result, *operands, **node.kwargs) if op.macs else 0
    if op.bytes:
        return Cost(macs, op.bytes(result, *operands, **node.kwargs))
    return Cost(macs, sum((v.bytes for v in _values(operands)), start=result.bytes))


def cost(program: Program, sizes: Mapping[str, int] | None = None) -> CostReport:
    """Costs at these sizes of the named dimensions; a name that is not given has its largest size.

    Raises:
        InputError: a name is unknown, or its size is out of its range.
    """
    sizes = dict(sizes or {})
    known = frozenset().union(*(f.dims for f in program.functions.values()))
    if unknown := sizes.keys() - known:
        raise InputError(
            f"unknown dimensions: {', '.join(sorted(unknown))}",
            fix=f"use {', '.join(sorted(known))}" if known else "leave them out: all sizes are fixed",
        )
    return CostReport(
        {name: function_cost(function, sizes) for name, function in program.functions.items()},
        program.parameters.bytes,
        sum(value.bytes for value in program.states.values()),
    )


def function_cost(function: Function, sizes: Mapping[str, int] | None = None) -> FunctionCost:
    """The cost of one function (see `cost`)."""
    at = {}
    for name, limits in function.dims.items():
        at[name] = (sizes or {}).get(name, limits.max)
        if not limits.min <= at[name] <= limits.max:
            raise InputError(
                f"dimension {name} is {at[name]}", fix=f"give a size in {limits.min}..{limits.max}"
            )
    by_op: dict[str, Row] = {}
    by_site: dict[str, Row] = {}
    for node in function.calls():
        work = node_cost(node)
        row = Row(1, evaluated(work.macs, at), evaluated(work.bytes, at))
        _count(by_op, node.target.name, row)
        _count(by_site, node.meta.get("site") or node.meta.get("module") or "", row)
    peak, peak_node = _peak(function, at)
    parameters = [function.parameters[n.target] for n in function.graph.find_nodes(op="get_attr")]
    return FunctionCost(
        sizes=at,
        macs=sum(row.macs for row in by_op.values()),
        bytes=sum(row.bytes for row in by_op.values()),
        parameter_bytes=sum({p.storage: p.tensor.nbytes for p in parameters}.values()),
        state_bytes=sum(value.bytes for value in function.states.values()),
        peak_bytes=peak,
        peak_node=peak_node,
        ops=by_op,
        sites=by_site,
    )


def _peak(function: Function, sizes: Mapping[str, int]) -> tuple[int, str]:
    """Most bytes that values hold at once and the node at which they do; a view keeps what it looks at alive."""
    states = in_place(function)
    nodes = [n for n in function.graph.nodes if n.op != "get_attr"]
    owner: dict[fx.Node, fx.Node] = {}
    last_use: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        for operand in node.all_input_nodes:
            if operand in owner:
                last_use[owner[operand]] = node
        if is_state(node) or node in states:
            continue
        if node.op == "call_function" and node.target.name in _VIEWS:
            source = node.args[0]
            if source in owner:
                owner[node] = owner[source]
                last_use[owner[source]] = node
            continue  # a view of a parameter or a state needs no memory
        if node.op != "output":
            owner[node] = last_use[node] = node
    ending: dict[fx.Node, list[fx.Node]] = {}
    for value, node in last_use.items():
        ending.setdefault(node, []).append(value)

    def size(node: fx.Node) -> int:
        return evaluated(node.meta["value"].bytes, sizes)

    # Inputs are there from the start, whenever their node stands.
    live = sum(map(size, function.input_nodes))
    peak, peak_node = live, nodes[0].name
    for node in nodes:
        if node.op == "call_function" and owner.get(node) is node:
            live += size(node)
        if live > peak:
            peak, peak_node = live, node.name
        live -= sum(size(value) for value in ending.get(node, ()))
    return peak, peak_node


def _count(table: dict[str, Row], key: str, row: Row) -> None:
    before = table.get(key, Row(0, 0, 0))
    table[key] = Row(before.count + row.count, before.macs + row.macs, before.bytes + row.bytes)


def _values(operands: Iterable[Any]) -> Iterable[Value]:
    for operand in operands:
        if isinstance(operand, Value):
            yield operand
        elif isinstance(operand, list | tuple):
            yield from _values(operand)


def evaluated(amount: int | Dim, sizes: Mapping[str, int]) -> int:
    """An amount of work or memory at these sizes of the named dimensions."""
    return amount.evaluate(sizes) if isinstance(amount, Dim) else amount
