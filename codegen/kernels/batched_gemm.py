"""Matrix products of two activations: neither operand is packed, any dimension may be symbolic.

One task is one batch element and one panel of columns. ``b`` [k, n] is read in place, row by row; a transposed ``b``
[n, k] is first copied panel by panel, so that the same register tile reads vectors of columns. So is the last,
incomplete panel of any ``b`` where masked loads cost a branch for every lane (NEON).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from tersor.codegen.kernels.arguments import function
from tersor.codegen.kernels.base import TensorSpec
from tersor.codegen.kernels.inner_product import inner_product
from tersor.codegen.kernels.register_tile import RegisterTile
from tersor.codegen.tiles import PANEL_VECTORS, PARALLEL_FLOPS, choose, most_rows
from tersor.ir.dims import Dim, Shape, product
from tersor.targets import Target


@dataclass(frozen=True)
class BatchedGemm:
    """``out[*batch, m, n] = a[*batch, m, k] @ b[*batch, k, n]`` in f32; ``transposed``: b is [*batch, n, k].

    ``a`` and ``b`` are the operands' whole shapes, of equal rank. A batch dimension of one operand may be 1 where the
    other's is not; its only matrix then serves all. Arguments: a, b, out. ValueError when the shapes do not multiply.
    """

    a: Shape
    b: Shape
    transposed: bool = False

    def __post_init__(self) -> None:
        fits = len(self.a) == len(self.b) >= 2 and self.a[-1] == self.b[-1 if self.transposed else -2]
        if not fits or any(x != y and 1 not in (x, y) for x, y in zip(self.a[:-2], self.b[:-2], strict=True)):
            raise ValueError(
                f"cannot multiply {self.a} by {self.b}{' transposed' if self.transposed else ''}"
            )

    @property
    def batch(self) -> Shape:
        """Leading dimensions of the result."""
        return tuple(y if x == 1 else x for x, y in zip(self.a[:-2], self.b[:-2], strict=True))

    @property
    def columns(self) -> int | Dim:
        """n."""
        return self.b[-2 if self.transposed else -1]

    def name(self) -> str:
        sizes = [str(d) if isinstance(d, int) else "n" for d in (self.a[-2], self.a[-1], self.columns)]
        return "_".join(["batched_gemm", "x".join(sizes)] + (["transposed"] if self.transposed else []))

    def inputs(self) -> tuple[TensorSpec, ...]:
        return TensorSpec(self.a), TensorSpec(self.b)

    def outputs(self) -> tuple[TensorSpec, ...]:
        return (TensorSpec((*self.batch, self.a[-2], self.columns)),)

    def build(self, target: Target) -> tirx.PrimFunc:
        return _Builder(self, target).function()


class _Builder:
    """Emits one kernel; the attributes are what every part of it refers to."""

    def __init__(self, kernel: BatchedGemm, target: Target):
        self.kernel, self.product = kernel, inner_product("float32", target)
        self.masks_cost = "neon" in target.features  # a branch for every lane
        self.lanes = self.product.lanes
        self.width = PANEL_VECTORS * self.lanes
        self.rows = min(choose(target, 1).rows, most_rows(target))

    def function(self) -> tirx.PrimFunc:
        kernel = self.kernel
        with function(kernel.name()) as (builder, arguments):
            self.a, self.b = (arguments.declare(n, s) for n, s in zip("ab", kernel.inputs(), strict=True))
            self.out = arguments.declare("out", kernel.outputs()[0])
            *batch, self.m, self.n = arguments.extents(kernel.outputs()[0].shape)
            (self.k,) = arguments.extents(kernel.a[-1:])
            work = 2 * product(batch) * self.m * self.n * self.k
            if isinstance(work, int):
                self._tasks(T.parallel if work >= PARALLEL_FLOPS else T.serial, batch)
            else:
                with T.If(work >= int(PARALLEL_FLOPS)):
                    with T.Then():
                        self._tasks(T.parallel, batch)
                    with T.Else():
                        self._tasks(T.serial, batch)
        return builder.get()

    def _tasks(self, loop: Callable[..., Any], batch: list[Expr | int]) -> None:
        panels = _ceildiv(self.n, self.width)
        with loop(product(batch) * panels) as task:
            place, rest = [], T.bind(task // panels)
            for extent in reversed(batch):
                place.insert(0, T.bind(rest % extent))
                rest = T.bind(rest // extent)
            first = T.bind(task % panels * self.width)
            if not self.masks_cost or isinstance(self.n, int) and self.n % self.width == 0:
                self._columns(place, first, copied=self.kernel.transposed)
                return
            with T.If(first + self.width <= self.n):
                with T.Then():
                    self._columns(place, first, copied=self.kernel.transposed, inside=True)
                with T.Else():
                    self._columns(place, first, copied=True)

    def _columns(self, place: list[Expr], first: Expr, copied: bool, inside: bool = False) -> None:
        """The panel of columns from ``first`` on. copied: from a copy of b. inside: none of them is beyond the last."""
        self.columns = [T.ramp(first + v * self.lanes, 1, self.lanes) for v in range(PANEL_VECTORS)]
        whole = inside or isinstance(self.n, int) and self.n % self.width == 0
        self.masks = [None if whole else self._inside(columns) for columns in self.columns]
        self._all_rows(place, self._copied_panel(place, first) if copied else self._panel(place))

    def _panel(self, place: list[Expr]) -> Callable[[Expr, int], Expr]:
        """Vectors of b read in place; lanes beyond the last column are not touched."""
        place = _place_in(place, self.kernel.b)

        def right(k: Expr, v: int) -> Expr:
            if self.masks[v] is None:
                return self.b[(*place, k, self.columns[v])]
            return T.masked_load(f"float32x{self.lanes}", self.b, *place, k, self.columns[v], self.masks[v])

        return right

    def _copied_panel(self, place: list[Expr], first: Expr) -> Callable[[Expr, int], Expr]:
        """A copy [k, width] of columns of b; beyond the last one it repeats that one, and nothing of it is stored."""
        place = _place_in(place, self.kernel.b)
        copy = T.alloc_buffer((self.k, self.width), scope="global")
        with T.serial(self.k) as k:
            with T.vectorized(self.width) as c:
                column = T.min(first + c, self.n - 1)
                at = (column, k) if self.kernel.transposed else (k, column)
                T.buffer_store(copy, self.b[(*place, *at)], [k, c])
        return lambda k, v: copy[k, T.ramp(v * self.lanes, 1, self.lanes)]

    def _all_rows(self, place: list[Expr], right: Callable[[Expr, int], Expr]) -> None:
        """Tiles of full height, the last overlapping its neighbour; fewer rows than that one by one."""
        rows = self.rows
        if isinstance(self.m, int):
            height = rows if self.m >= rows else self.m
            with T.serial(-(-self.m // height)) as i:
                self._tile(place, right, T.min(i * height, self.m - height), height)
            return
        with T.If(self.m >= rows):
            with T.Then():
                with T.serial(T.ceildiv(self.m, rows)) as i:
                    self._tile(place, right, T.min(i * rows, self.m - rows), rows)
            with T.Else():
                with T.serial(self.m) as i:
                    self._tile(place, right, i, 1)

    def _tile(self, place: list[Expr], right: Callable[[Expr, int], Expr], start: Expr, height: int) -> None:
        start = T.bind(start)
        sums = RegisterTile(height, PANEL_VECTORS, self.product)
        left = _place_in(place, self.kernel.a)

        def words(r: int, k: Expr, count: int) -> Expr:
            return self.a[(*left, start + r, k if count == 1 else T.ramp(k, 1, count))]

        sums.accumulate(0, self.k, words, lambda v, k: right(k, v))
        for v, (columns, mask) in enumerate(zip(self.columns, self.masks, strict=True)):
            for r in range(height):
                if mask is None:
                    T.buffer_store(self.out, sums.vector(r, v), [*place, start + r, columns])
                else:
                    T.evaluate(T.masked_store(self.out, sums.vector(r, v), *place, start + r, columns, mask))

    def _inside(self, columns: Expr) -> Expr:
        """Which of these columns exist."""
        return columns < T.broadcast(T.cast(self.n, columns.ty.dtype.with_lanes(1)), self.lanes)


def _place_in(place: list[Expr], shape: Shape) -> list[Expr | int]:
    """Indices of a batch element in an operand, some of whose batch dimensions may be 1."""
    return [0 if extent == 1 else index for extent, index in zip(shape[:-2], place, strict=True)]


def _ceildiv(a: Expr | int, b: int) -> Expr | int:
    return -(-a // b) if isinstance(a, int) else T.ceildiv(a, b)
