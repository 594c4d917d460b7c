"""Look-ups and comparisons whose index is known: slices, reshapes and constants take their place."""

from __future__ import annotations

import operator
from collections.abc import Mapping

from torch import fx

from tersor.errors import CaptureError
from tersor.ir.canonicalize.affine import Affine, Number, Positions, known, lower_bound
from tersor.ir.dims import Dim, evaluate_shape, shape_symbols
from tersor.ir.matching import Match, P, Rule
from tersor.ir.program import Builder, Range
from tersor.ir.verifier import describe, negative_at


def _run(affine: Affine) -> tuple[Number, Number, set[int]] | None:
    """(start, count, axes) when the values, in row-major order of these axes, are start, start + 1, ...; else None."""
    expected: Number = 1
    for axis in reversed(range(len(affine.shape))):
        if axis in affine.coefficients:
            if affine.coefficients[axis] != expected:
                return None
            expected = expected * affine.shape[axis]
    return affine.offset, expected, set(affine.coefficients)


def _take_run(build: Builder, x: fx.Node, dim: int, affine: Affine) -> fx.Node:
    """x at the positions of a run along ``dim``: a slice, brought to the index's shape by reshape and expand."""
    start, count, axes = _run(affine)
    shape = x.meta["value"].shape
    taken = build.slice(x, dim=dim, start=start, end=start + count)
    index = tuple(d if a in axes else 1 for a, d in enumerate(affine.shape))
    taken = build.reshape(taken, shape=(*shape[:dim], *index, *shape[dim + 1 :]))
    return build.expand(taken, shape=(*shape[:dim], *affine.shape, *shape[dim + 1 :]))


def _index(m: Match) -> Affine | None:
    return Positions(m.function).affine(m["index"])


class TableTooShort(CaptureError):
    """Rows are read that a table does not have at some of the sizes that the dynamic dimensions may take.

    Attributes:
        dim: the dimension that decides it, where there is only one.
        least, most: the sizes of it between which all rows are there.
    """

    def __init__(self, what: str, *, spare: Number, **details: str | None):
        """``spare``: how many rows more there are than are read; negative where they are too few."""
        super().__init__(what, **details)
        names = sorted(shape_symbols((spare,)))
        constant = evaluate_shape((spare,), dict.fromkeys(names, 0))[0]
        slope = evaluate_shape((spare,), dict.fromkeys(names, 1))[0] - constant
        linear = len(names) == 1 and spare == slope * Dim.symbol(names[0]) + constant
        self.dim = names[0] if linear else None
        self.least = -(constant // slope) if linear and slope > 0 else 1
        self.most = constant // -slope if linear and slope < 0 else None

    def fitting(self, bounds: Range) -> Range | None:
        """The part of the dimension's range for which all rows are there."""
        least = max(self.least, bounds.min)
        most = bounds.max if self.most is None else min(self.most, bounds.max)
        return Range(least, most) if least <= most else None


def check_inside(
    start: Number, end: Number, rows: Number, dims: Mapping[str, Range], what: str, where: str | None = None
) -> None:
    """Rows beyond either end of a table are an error of the signature, and nobody would find it at run time.

    Raises:
        TableTooShort: start < 0 or end > rows at some of the dimensions' sizes.
    """
    for spare in (start, rows - end):
        sizes = negative_at(spare, dims)
        if sizes is not None:
            at = ", ".join(f"{name} {size}" for name, size in sizes.items())
            raise TableTooShort(
                what,
                spare=spare,
                where=where,
                why=f"positions {start} to {end} of {rows} are read, and the signature allows {at or 'it'}",
                fix=f"narrow the range of {' or '.join(sizes) or 'positions'}, or name the same dimensions for all "
                "inputs that go together",
            )


def slice_inside(
    build: Builder, x: fx.Node, dim: int, start: Number, end: Number, step: int, what: str
) -> fx.Node:
    """A slice that lies within ``x`` at all sizes of the dynamic dimensions; raises as `check_inside`."""
    check_inside(start, end, x.meta["value"].shape[dim], build.function.dims, what)
    return build.slice(x, dim=dim, start=start, end=end, step=step)


def _check_inside(m: Match, table: fx.Node, dim: int) -> None:
    start, count, _ = _run(_index(m))
    rows = table.meta["value"].shape[dim]
    what = f"{rows} rows are too few for the dynamic dimensions"
    check_inside(start, start + count, rows, m.function.dims, what, describe(table))


def _embeds_run(m: Match) -> str | None:
    if reason := _is_run(m):
        return reason
    _check_inside(m, m["table"], 0)
    return None


def _selects_run(m: Match) -> str | None:
    if reason := _is_run(m):
        return reason
    _check_inside(m, m["x"], m.root.kwargs["dim"] % m.value("x").rank)
    return None


def _is_run(m: Match) -> str | None:
    affine = _index(m)
    if affine is None:
        return "the index depends on inputs, or is not a linear function of position"
    run = _run(affine)
    if run is None:
        return "the index does not count up by one"
    return "the index counts from the end" if lower_bound(run[0], m.function.dims) < 0 else None


def _decided(m: Match) -> str | None:
    return None if known(m.function, m.root) is not None else "it is not the same everywhere"


def _decide(build: Builder, m: Match) -> fx.Node:
    return build.full(shape=m.root.meta["value"].shape, value=bool(known(m.function, m.root)), dtype="bool")


def _branch(m: Match) -> str | None:
    if known(m.function, m["condition"]) is None:
        return "the condition is not the same everywhere"
    chosen = _chosen(m)
    if isinstance(chosen, fx.Node) and chosen.meta["value"].dtype != m.root.meta["value"].dtype:
        return "the branch has another type"
    return None


def _chosen(m: Match) -> object:
    return m["x"] if known(m.function, m["condition"]) else m["y"]


def _take_branch(build: Builder, m: Match) -> fx.Node:
    chosen, value = _chosen(m), m.root.meta["value"]
    if isinstance(chosen, fx.Node):
        return build.expand(chosen, shape=value.shape)
    return build.full(shape=value.shape, value=chosen, dtype=value.dtype)


def _gathers_run(m: Match) -> str | None:
    if reason := _is_run(m):
        return reason
    start, count, axes = _run(_index(m))
    dim, index, x = m.root.kwargs["dim"] % m.value("x").rank, m.value("index").shape, m.value("x").shape
    if axes - {dim} or any(a != b for i, (a, b) in enumerate(zip(index, x, strict=True)) if i != dim):
        return "it gathers along several axes"
    _check_inside(m, m["x"], dim)
    return None


def _gather_slice(build: Builder, m: Match) -> fx.Node:
    start, count, _ = _run(_index(m))
    dim = m.root.kwargs["dim"] % m.value("x").rank
    taken = build.slice(m["x"], dim=dim, start=start, end=start + count)
    return build.expand(taken, shape=m.root.meta["value"].shape)


_COMPARE = {"lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge, "eq": operator.eq,
            "ne": operator.ne}  # fmt: skip


def _outcomes(m: Match) -> tuple[bool, bool]:
    """What a comparison of a choice between two numbers gives for either of them."""
    compare = _COMPARE[m.root.target.name]
    return compare(m["x"], m["limit"]), compare(m["y"], m["limit"])


def _read_choice(build: Builder, m: Match) -> fx.Node:
    first, second = _outcomes(m)
    return m["condition"] if first and not second else build.logical_not(m["condition"])


def _and_true(m: Match) -> str | None:
    return None if known(m.function, m["yes"]) is True else "neither side is always true"


RULES = (
    # embedding(arange(T), table)  ->  table[:T];  embedding(zeros, table)  ->  table[0:1], expanded
    Rule(
        "indices.embedding",
        P.embedding(P.any("index"), P.any("table")),
        lambda build, m: _take_run(build, m["table"], 0, _index(m)),
        _embeds_run,
    ),
    # index_select(reshape(x, B*T), arange(B)[:, None]*T + arange(T))  ->  reshape(x)
    Rule(
        "indices.select",
        P.index_select(P.any("x"), P.any("index")),
        lambda build, m: _take_run(build, m["x"], m.root.kwargs["dim"] % m.value("x").rank, _index(m)),
        _selects_run,
    ),
    # gather(x, arange(T))  ->  x[:T]
    Rule("indices.gather", P.gather(P.any("x"), P.any("index")), _gather_slice, _gathers_run),
    # arange(T) >= 0  ->  full(true)
    Rule("indices.compare", P.op(("le", "lt", "ge", "gt"), P.any(), P.optional("other")), _decide, _decided),
    # argmax(x) < 0  ->  full(false)
    Rule(
        "indices.not_negative",
        P.lt(P.op(("argmax", "argsort"), ...), 0),
        lambda build, m: build.full(shape=m.root.meta["value"].shape, value=False, dtype="bool"),
    ),
    # where(full(true), x, y)  ->  x
    Rule(
        "indices.where",
        P.where(P.any("condition"), P.optional("x"), P.optional("y")),
        _take_branch,
        _branch,
    ),
    # where(c, 0, -inf) < -1  ->  not c
    Rule(
        "indices.compare_choice",
        P.op(
            tuple(_COMPARE),
            P.where(P.any("condition"), P.number("x"), P.number("y")),
            P.number("limit"),
        ),
        _read_choice,
        lambda m: "both choices compare alike" if len(set(_outcomes(m))) == 1 else None,
    ),
    # x and true  ->  x
    Rule(
        "indices.and",
        P.logical_and(P.any("x"), P.any("yes")),
        lambda build, m: build.expand(m["x"], shape=m.root.meta["value"].shape),
        _and_true,
    ),
)
