"""The innermost block of every matrix product: a few rows by a few vectors of accumulators, held in registers."""

from __future__ import annotations

from collections.abc import Callable

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from tersor.codegen.kernels.inner_product import InnerProduct


class RegisterTile:
    """``height`` rows by ``vectors`` vectors of accumulators.

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
        zero = tirx.const(0, f"{product.accumulator}x{product.lanes}")
        # TVM keeps allocations below 1 kB, outside scope "local", on the stack; LLVM turns those into registers.
        self._rows = [
            T.alloc_buffer((vectors * self.lanes,), product.accumulator, scope="global")
            for _ in range(height)
        ]
        for r, row in enumerate(self._rows):
            for v in range(vectors):
                T.buffer_store(row, start(r, v) if start else zero, [self._place(v)])

    def multiply(self, left: Callable[[int], Expr], right: Callable[[int], Expr]) -> None:
        """Add one outer product: ``left(r)`` is a word of row r, ``right(v)`` vector v of the other matrix's words."""
        for left_part, right_part in self.product.parts:
            for r, row in enumerate(self._rows):
                for v in range(self.vectors):
                    at = self._place(v)
                    word = left_part(T.broadcast(left(r), self.lanes))
                    T.buffer_store(row, self.product.step(row[at], word, right_part(right(v))), [at])

    def vector(self, r: int, v: int) -> Expr:
        """Vector v of row r."""
        return self._rows[r][self._place(v)]

    def column(self, v: int) -> tirx.Buffer:
        """A copy of vector v of every row, [height, lanes], that a loop can index."""
        copy = T.alloc_buffer((self.height, self.lanes), self.product.accumulator, scope="global")
        for r in range(self.height):
            T.buffer_store(copy, self.vector(r, v), [r, T.ramp(0, 1, self.lanes)])
        return copy

    def _place(self, v: int) -> Expr:
        return T.ramp(v * self.lanes, 1, self.lanes)
