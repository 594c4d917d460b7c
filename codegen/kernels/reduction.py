"""A row of values folded into one, in an order that no instruction set changes: everywhere the same bits.

Value i belongs to partial result ``i % width``, and each takes its values in ascending order. Then the upper half of
the partial results is folded into the lower half until one is left. A vector holds as many as it has lanes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from tersor.codegen.kernels import loops, math

WIDTH = 16
"""Partial results of a row, one vector of AVX-512."""

Combine = Callable[[Expr, Expr], Expr]
Lanes = Callable[[loops.Extent, Expr | None], Expr]
"""A vector of a row's values at an offset."""


def reduce(
    full: loops.Extent,
    rest: loops.Extent,
    lanes: int,
    value: Lanes,
    combine: Combine,
    identity: Expr,
    width: int = WIDTH,
) -> Expr:
    """``full`` vectors, and one with ``rest`` lanes behind them, combined into a scalar.

    Args:
        value: called for every vector in turn; lanes outside the mask must be the identity.
        combine: of a partial result and a vector of values, or another partial result.
        identity: the scalar that changes nothing.
        width: partial results, a power of 2, at least the lanes of the widest vectors.
    """
    count, at = width // lanes, T.ramp(0, 1, lanes)
    start = math.broadcast(identity, lanes)
    parts = [T.alloc_buffer((1, lanes), math.element_of(identity), scope="global") for _ in range(count)]
    for part in parts:
        T.buffer_store(part, start, [0, at])

    def add(part: tirx.Buffer, j: Expr | int, offset: loops.Extent, where: Expr | None = None) -> None:
        term = value(offset, where)
        T.buffer_store(part, combine(part[j, at], term), [j, at])

    rounds = full // count
    if not isinstance(rounds, int) or rounds:
        with T.serial(rounds) as i:
            for j, part in enumerate(parts):
                add(part, 0, (i * count + j) * lanes)
    done, left = rounds * count, full % count
    if isinstance(full, int):
        for j in range(left):
            add(parts[j], 0, (done + j) * lanes)
        if rest:
            add(parts[left], 0, full * lanes, loops.mask(rest, lanes))
        return fold([part[0, at] for part in parts], combine)
    if count > 1:  # which partial result is next is only known at run time: registers have no numbers then
        kept = T.alloc_buffer((count, lanes), math.element_of(identity), scope="global")
        for j, part in enumerate(parts):
            T.buffer_store(kept, part[0, at], [j, at])
        with T.serial(left) as j:
            add(kept, j, (done + j) * lanes)
    else:
        kept = parts[0]
    if not isinstance(rest, int):
        with T.If(rest > 0):
            with T.Then():
                add(kept, left if count > 1 else 0, full * lanes, loops.mask(rest, lanes))
    return fold([kept[j, at] for j in range(count)], combine)


def fold(vectors: Sequence[Expr], combine: Combine) -> Expr:
    """One value from all lanes of a power of 2 of vectors."""
    while len(vectors) > 1:
        half = len(vectors) // 2
        vectors = [combine(a, b) for a, b in zip(vectors[:half], vectors[half:], strict=True)]
    return math.horizontal(combine, vectors[0])


def plus(a: Expr, b: Expr) -> Expr:
    """How sums are combined."""
    return a + b
