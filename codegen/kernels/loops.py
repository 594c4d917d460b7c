"""Loops that memory-bound kernels share: rows over threads, vectors along a row with an exact tail."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from tersor.codegen.kernels import math
from tersor.ir.dims import Shape, product

PARALLEL_ELEMENTS = 1 << 16
"""Elements of simple work (5 to 10 us on one core) below which waking other threads costs more than it saves."""

Extent = int | Expr

ROLLED = """
define void @tersor_stay_rolled() alwaysinline {
  call void asm sideeffect "", ""() noduplicate
  ret void
}
"""


def flat(buffer: tirx.Buffer) -> tirx.Buffer:
    """An argument seen as one dimension; call it after all arguments are declared.

    Bools are seen as the bytes they are, to be cast: TVM cannot lower every vector store of bools.
    """
    if buffer.dtype == "bool":
        return T.decl_buffer((product(buffer.shape),), "int8", data=buffer.data)
    if len(buffer.shape) == 1:
        return buffer
    return T.decl_buffer((product(buffer.shape),), buffer.dtype, data=buffer.data)


def merge_dims(output: Shape, patterns: list[tuple[bool, ...]]) -> list[tuple[Shape, tuple[bool, ...]]]:
    """Neighbouring dimensions of ``output`` as groups that every input either moves along or repeats.

    ``patterns[i][d]``: whether input i moves along dimension d. Gives (dimensions, whether each input moves) per
    group, outermost first; dimensions of size 1 vanish; there is at least one group.
    """
    groups: list[tuple[Shape, tuple[bool, ...]]] = []
    for dim, *along in zip(output, *patterns, strict=True):
        if dim == 1:
            continue
        if groups and groups[-1][1] == tuple(along):
            groups[-1] = ((*groups[-1][0], dim), groups[-1][1])
        else:
            groups.append(((dim,), tuple(along)))
    return groups or [((1,), (False,) * len(patterns))]


def ravel(
    position: Sequence[Extent], extents: Sequence[Extent], along: Sequence[bool] | None = None
) -> Extent:
    """The row-major index of a position; with ``along``, in an array that has only those dimensions."""
    index: Extent = 0
    for at, extent, moves in zip(position, extents, along or [True] * len(extents), strict=True):
        if moves:
            index = index * extent + at
    return index


def unravel(index: Extent, extents: Sequence[Extent]) -> list[Extent]:
    """The position of a row-major index: the inverse of ``ravel``."""
    position: list[Extent] = []
    for extent in reversed(extents[1:]):
        position.insert(0, tirx.floormod(index, extent))
        index = tirx.floordiv(index, extent)
    return [index, *position] if extents else []


@contextmanager
def rolled(extent: Extent) -> Iterator[Expr]:
    """A loop that LLVM leaves as it is: it unrolls short ones, and then moves all it can out of loops around them."""
    with T.serial(extent) as i:
        with T.attr(T.int32(0), "pragma_import_llvm", ROLLED):
            T.evaluate(T.call_extern("void", "tersor_stay_rolled"))
        yield i


def rows(
    extent: Extent,
    elements: Extent,
    body: Callable[[Expr], None],
    threshold: float = PARALLEL_ELEMENTS,
) -> None:
    """``body(row)`` for each row, on several threads when ``elements`` in all reach the threshold."""

    def loop(kind: Callable) -> None:
        with kind(extent) as row:
            body(row)

    parallel = T.serial if isinstance(extent, int) and extent == 1 else T.parallel
    when_large(elements, threshold, lambda: loop(parallel), lambda: loop(T.serial))


def when_large(work: Extent, threshold: float, large: Callable[[], None], small: Callable[[], None]) -> None:
    """Emit the code for ``work`` of at least the threshold, for less, or a choice between them at run time."""
    if isinstance(work, int):
        large() if work >= threshold else small()
        return
    with T.If(work >= int(threshold)):
        with T.Then():
            large()
        with T.Else():
            small()


def vectors(extent: Extent, lanes: int, body: Callable[[Expr | int, Expr | None], None]) -> None:
    """``body(offset, mask)`` for every vector of a row; the mask is None but for the last, incomplete one."""
    full, rest = split(extent, lanes)
    if not isinstance(full, int) or full:
        with T.serial(full) as i:
            body(i * lanes, None)
    if isinstance(rest, int):
        if rest:
            body(full * lanes, mask(rest, lanes))
        return
    with T.If(rest > 0):
        with T.Then():
            body(full * lanes, mask(rest, lanes))


def split(extent: Extent, lanes: int) -> tuple[Extent, Extent]:
    """Whole vectors of a row, and what is left behind them."""
    if isinstance(extent, int):
        return divmod(extent, lanes)
    return tirx.floordiv(extent, lanes), tirx.floormod(extent, lanes)


def mask(count: Extent, lanes: int) -> Expr:
    """A vector of bools, true in the first ``count`` lanes."""
    bound = tirx.const(count, "int32") if isinstance(count, int) else tirx.Cast("int32", count)
    return T.ramp(0, 1, lanes) < math.broadcast(bound, lanes)


def load(buffer: tirx.Buffer, offset: Extent, lanes: int, where: Expr | None = None) -> Expr:
    """A vector of consecutive elements; lanes outside the mask are not read and are 0."""
    at = T.ramp(offset, 1, lanes)
    if where is None:
        return buffer[at]
    # a statement of its own: inside a Select with the same mask TVM would take the mask for true everywhere, and read
    # past the end of the memory
    return math.bind(T.masked_load(f"{buffer.dtype}x{lanes}", buffer, at, where))


def prefetch(buffer: tirx.Buffer, *place: Extent) -> None:
    """Fetch the line of an element into cache; past the end of the buffer it does no harm."""
    T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch.p0", T.address_of(buffer[place]), 0, 3, 1))


def store(buffer: tirx.Buffer, offset: Extent, value: Expr, lanes: int, where: Expr | None = None) -> None:
    """Write a vector (a scalar is repeated); lanes outside the mask are left alone."""
    store_at(buffer, [T.ramp(offset, 1, lanes)], math.broadcast(value, lanes), where)


def store_at(buffer: tirx.Buffer, place: list[Extent], value: Expr, where: Expr | None = None) -> None:
    """Write a vector to indices of which the last is a ramp; lanes outside the mask are left alone."""
    if where is None:
        T.buffer_store(buffer, value, place)
    elif isinstance(where, tirx.LT) and isinstance(where.b.value, tirx.IntImm) and where.b.value.value == 1:
        # one lane: LLVM 22 would make it a scalar store of 32 bits even where the element was narrowed to fewer
        T.buffer_store(buffer, tirx.Shuffle([value], [0]), [*place[:-1], place[-1].base])
    else:
        T.evaluate(T.masked_store(buffer, value, *place, where))
