"""The innermost block of every matrix product: a few rows by a few vectors of accumulators, held in registers."""

from __future__ import annotations

from collections.abc import Callable

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T


class RegisterTile:
    """``height`` rows by ``vectors`` vectors of ``lanes`` f32.

    Where it is made, vector v of row r is set to ``start(r, v)``, or to zero.
    """

    def __init__(
        self, height: int, vectors: int, lanes: int, start: Callable[[int, int], Expr] | None = None
    ):
        self.height, self.vectors, self.lanes = height, vectors, lanes
        # TVM keeps allocations below 1 kB, outside scope "local", on the stack; LLVM turns those into registers.
        self._rows = [T.alloc_buffer((vectors * lanes,), scope="global") for _ in range(height)]
        for r, row in enumerate(self._rows):
            for v in range(vectors):
                value = start(r, v) if start else T.broadcast(T.float32(0), lanes)
                T.buffer_store(row, value, [self._place(v)])

    def multiply(self, left: Callable[[int], Expr], right: Callable[[int], Expr]) -> None:
        """Add one outer product: ``left(r)`` is the scalar of row r, ``right(v)`` vector v of the other matrix."""
        for r, row in enumerate(self._rows):
            for v in range(self.vectors):
                at = self._place(v)
                T.buffer_store(row, row[at] + T.broadcast(left(r), self.lanes) * right(v), [at])

    def vector(self, r: int, v: int) -> Expr:
        """Vector v of row r."""
        return self._rows[r][self._place(v)]

    def column(self, v: int) -> tirx.Buffer:
        """A copy of vector v of every row, [height, lanes], that a loop can index."""
        copy = T.alloc_buffer((self.height, self.lanes), scope="global")
        for r in range(self.height):
            T.buffer_store(copy, self.vector(r, v), [r, T.ramp(0, 1, self.lanes)])
        return copy

    def _place(self, v: int) -> Expr:
        return T.ramp(v * self.lanes, 1, self.lanes)
