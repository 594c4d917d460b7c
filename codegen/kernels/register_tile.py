"""The innermost block of every matrix product: a few rows by a few vectors of results, held in registers."""

from __future__ import annotations

from collections.abc import Callable

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from tersor.codegen.kernels import loops, math
from tersor.codegen.kernels.assembly import REGISTERS, Loop
from tersor.codegen.kernels.inner_product import InnerProduct


class RegisterTile:
    """``height`` rows by ``vectors`` vectors of results.

    Where it is made, vector v of row r is set to ``start(r, v)``, or to zero.
    """

    def __init__(
        self,
        height: int,
        vectors: int,
        product: InnerProduct,
        start: Callable[[int, int], Expr] | None = None,
    ):
        self.height, self.vectors, self.lanes, self.product = height, vectors, product.lanes, product
        self._units = vectors * product.per_vector
        # partial sums cannot start from a result: it is added at the end
        self._start = start if product.block != (1, product.lanes) else None
        zero = tirx.const(0, f"{product.accumulator}x{product.lanes}")
        # TVM keeps allocations below 1 kB, outside scope "local", on the stack; LLVM turns those into registers.
        self._rows = [
            T.alloc_buffer((self._units * self.lanes,), product.accumulator, scope="global")
            for _ in range(-(-height // product.block[0]))
        ]
        for r, row in enumerate(self._rows):
            for v in range(self._units):
                value = start(r, v) if start and self._start is None else zero
                T.buffer_store(row, value, [self._place(v)])

    def accumulate(
        self,
        first: Expr | int,
        count: Expr | int,
        left: Callable[[int, Expr, int], Expr],
        right: Callable[[int, Expr], Expr],
    ) -> None:
        """Add the outer products of words ``first`` to ``first + count - 1``.

        ``left(r, k, n)`` is n words of block r of rows from word k on, ``right(v, k)`` vector v of the words k.
        """
        group = self.product.group
        whole = count // group
        if not isinstance(whole, int) or whole:
            # unrolled, a loop like this would have all its left words, and some sums, moved to the stack
            many = isinstance(whole, int) and whole * group * self.height > REGISTERS
            with (loops.rolled if many else T.serial)(whole) as i:
                self.multiply(first + i * group, group, left, right)
        rest = count % group if group > 1 else 0
        if not isinstance(rest, int) or rest:
            with T.serial(rest) as i:
                self.multiply(first + (whole * group + i), 1, left, right)

    def stream(
        self, words: int | Expr, left: Callable[[int], Expr], right: Expr, ahead: int | None = None
    ) -> None:
        """Add the outer products of so many words >= 1, no more than a piece of ``product.assembly``, by that.

        A number that is not constant is a multiple of ``product.assembly.step``.
        ``left(r)`` is the address of the first one of block r of rows, ``right`` that of the right matrix', of which
        vector follows vector and word follows word. ``ahead``: bytes between the words in use and those prefetched.
        """
        constant = isinstance(words, int)
        loop = Loop(self.product.assembly, len(self._rows), self._units, words if constant else None, ahead)
        count = [] if constant else [tirx.Cast("int64", words)]
        sums = [T.address_of(row[0]) for row in self._rows]
        with T.attr(T.int32(0), "pragma_import_llvm", loop.text()):
            T.evaluate(T.call_extern("void", loop.name, *sums, *map(left, range(loop.height)), right, *count))

    def multiply(
        self,
        k: Expr | int,
        count: int,
        left: Callable[[int, Expr, int], Expr],
        right: Callable[[int, Expr], Expr],
    ) -> None:
        """Add ``count`` outer products, that of words k and those behind it; arguments as in ``accumulate``."""
        product = self.product
        for left_part, right_part in product.parts:
            if not product.loads:
                self._step(
                    lambda r, part=left_part: part(product.spread(left(r, k, 1), 0)),
                    lambda v, part=right_part: part(right(v, k)),
                )
                continue
            words = [math.bind(left_part(left(r, k, count))) for r in range(len(self._rows))]
            for i in range(count):
                self._step(
                    lambda r, i=i, words=words: product.spread(words[r], i),
                    lambda v, i=i, part=right_part: part(right(v, k + i)),
                )

    def _step(self, left: Callable[[int], Expr], right: Callable[[int], Expr]) -> None:
        for r, row in enumerate(self._rows):
            for v in range(self._units):
                at = self._place(v)
                T.buffer_store(row, self.product.step(row[at], left(r), right(v)), [at])

    def vector(self, r: int, v: int) -> Expr:
        """Vector v of row r."""
        count = self.product.per_vector
        row, i = divmod(r, self.product.block[0])
        parts = [self._rows[row][self._place(v * count + j)] for j in range(count)]
        value = self.product.row(parts, i)
        return value if self._start is None else value + self._start(r, v)

    def column(self, v: int) -> tirx.Buffer:
        """A copy of vector v of every row, [height, lanes], that a loop can index."""
        copy = T.alloc_buffer((self.height, self.lanes), self.product.accumulator, scope="global")
        for r in range(self.height):
            T.buffer_store(copy, self.vector(r, v), [r, T.ramp(0, 1, self.lanes)])
        return copy

    def _place(self, v: int) -> Expr:
        return T.ramp(v * self.lanes, 1, self.lanes)


class ScaledSums:
    """``height`` rows by ``vectors`` vectors of f32 sums of a `RegisterTile`'s results, from zero on."""

    def __init__(self, height: int, vectors: int, lanes: int):
        self._vectors, self._lanes = vectors, lanes
        self._rows = [T.alloc_buffer((vectors * lanes,), scope="global") for _ in range(height)]
        zero = tirx.const(0.0, f"float32x{lanes}")
        for row in self._rows:
            for v in range(vectors):
                T.buffer_store(row, zero, [self._place(v)])

    def add(self, tile: RegisterTile, scale: Callable[[int], Expr]) -> None:
        """Add a tile's results, whole numbers, those of row r times ``scale(r)``."""
        for r, row in enumerate(self._rows):
            factor = math.bind(math.broadcast(scale(r), self._lanes))
            for v in range(self._vectors):
                at = self._place(v)
                result = tirx.Cast(f"float32x{self._lanes}", tile.vector(r, v))
                T.buffer_store(row, row[at] + result * factor, [at])

    def column(self, v: int) -> tirx.Buffer:
        """As that of `RegisterTile`."""
        copy = T.alloc_buffer((len(self._rows), self._lanes), scope="global")
        for r, row in enumerate(self._rows):
            T.buffer_store(copy, row[self._place(v)], [r, T.ramp(0, 1, self._lanes)])
        return copy

    def _place(self, v: int) -> Expr:
        return T.ramp(v * self._lanes, 1, self._lanes)
