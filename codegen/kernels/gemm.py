"""Packed f32 GEMM with a composed epilogue: ``out = chain(a @ w.T, ...)`` for constant, packed weights ``w``.

One panel of weights (a few columns, all of K) is read as a stream; each register tile multiplies it with a few rows of
``a`` over the whole of K, applies the chain to the accumulators and stores them once.

* Several tiles per panel: the panel stays in L2, and every tile fetches its share of the next panel into cache.
* One tile per panel (few rows): each weight is used once; the kernel fetches a fixed distance ahead in the stream.
* Static row counts are cut exactly. A symbolic one chooses at run time between streaming tiles (surplus rows repeat
  the last one) and full tiles, the last of which overlaps its neighbour.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import tvm
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from tersor.codegen import tiles
from tersor.codegen.kernels.arguments import Arguments
from tersor.codegen.kernels.base import TensorSpec
from tersor.codegen.kernels.chain import Chain, ChainInput
from tersor.codegen.kernels.math import evaluate_chain
from tersor.codegen.packing import packed_shape
from tersor.ir.dims import Dim, Shape, product
from tersor.targets import Target

IDENTITY = Chain((ChainInput("accumulator"),), (), (0,))
"""The epilogue of a plain matrix product."""

CHUNK = 16
"""Steps of k between two groups of prefetches in a tile that shares its panel with others."""


@dataclass(frozen=True)
class Gemm:
    """``out[*lead, n] = chain(a[*lead, k] @ w[n, k].T, ...)`` in f32.

    ``panel`` is the width of a packed panel: ``tiles.panel_width(target)``. ``weights`` matrices of equal shape are
    packed together (``packing.pack``), and each has an accumulator: the chain's first ``weights`` inputs. So
    ``silu(a @ gate.T) * (a @ up.T)`` is one kernel. The chain may have several outputs, all f32 [*lead, n].

    Arguments: a, packed weights, the chain's other inputs in order ("full" [*lead, n], "column" [n],
    "row" [*lead, 1], "scalar" ()); then the outputs, which must not overlap any input.
    ValueError when chain, panel and weights do not fit together.
    """

    lead: Shape
    k: int
    n: int
    chain: Chain = IDENTITY
    panel: int = 32
    weights: int = 1

    def __post_init__(self) -> None:
        kinds = [value.kind for value in self.chain.inputs]
        if kinds.count("accumulator") != self.weights or "accumulator" in kinds[self.weights :]:
            raise ValueError(
                f"the chain of a GEMM with {self.weights} weights starts with as many accumulators: {kinds}"
            )
        if self.panel % self.weights:
            raise ValueError(f"a panel of {self.panel} columns cannot hold {self.weights} weights")

    @property
    def columns(self) -> int:
        """Output columns of a panel."""
        return self.panel // self.weights

    @property
    def rows(self) -> int | Dim:
        """Rows of the product: all leading dimensions together."""
        return product(self.lead)

    def name(self) -> str:
        parts = ["gemm", f"{self.k}x{self.n}"]
        parts += [str(self.rows)] if isinstance(self.rows, int) else []
        parts += [f"w{self.weights}"] if self.weights > 1 else []
        return "_".join(parts + ([self.chain.label()] if self.chain.steps else []))

    def inputs(self) -> tuple[TensorSpec, ...]:
        shapes = {"full": (*self.lead, self.n), "column": (self.n,), "row": (*self.lead, 1), "scalar": ()}
        return (
            TensorSpec((*self.lead, self.k)),
            TensorSpec(packed_shape(self.n, self.k, self.panel, self.weights)),
            *(TensorSpec(shapes[v.kind], v.dtype) for v in self.chain.inputs[self.weights :]),
        )

    def outputs(self) -> tuple[TensorSpec, ...]:
        return (TensorSpec((*self.lead, self.n)),) * len(self.chain.outputs)

    def build(self, target: Target, tile: tiles.GemmTile | None = None) -> tirx.PrimFunc:
        """The scheduled function; ``tile`` overrides the chooser. ValueError when the panel does not suit the target."""
        lanes = target.lanes("float32")
        if self.columns % lanes:
            raise ValueError(f"{self.columns} columns a panel are not whole vectors of {lanes}")
        return _Builder(self, lanes, tile or tiles.choose(target)).function()


class _Builder:
    """Emits one kernel; the attributes are what every part of it refers to."""

    def __init__(self, gemm: Gemm, lanes: int, tile: tiles.GemmTile):
        self.gemm, self.lanes, self.tile = gemm, lanes, tile
        self.vectors = gemm.panel // lanes
        self.panels = packed_shape(gemm.n, gemm.k, gemm.panel, gemm.weights)[0]
        self.line = tiles.CACHE_LINE // 4

    def function(self) -> tirx.PrimFunc:
        gemm = self.gemm
        with tvm.script.ir_builder.IRBuilder() as builder:
            with T.prim_func(s_tir=True):
                T.func_name(gemm.name())
                T.func_attr({"tirx.noalias": True})
                arguments = Arguments()
                names = [
                    "a",
                    "w",
                    *(f"{v.kind}_{i}" for i, v in enumerate(gemm.chain.inputs[gemm.weights :])),
                ]
                inputs = [
                    arguments.declare(name, spec) for name, spec in zip(names, gemm.inputs(), strict=True)
                ]
                outputs = [arguments.declare(f"out_{i}", spec) for i, spec in enumerate(gemm.outputs())]
                self.a, self.w = arguments.flatten(inputs[0]), inputs[1]
                self.others = [
                    (value, arguments.flatten(buffer) if value.kind in ("full", "row") else buffer)
                    for value, buffer in zip(gemm.chain.inputs[gemm.weights :], inputs[2:], strict=True)
                ]
                self.outputs = [arguments.flatten(buffer) for buffer in outputs]
                self._schedule(arguments.size(gemm.lead))
        return builder.get()

    def _schedule(self, m: int | tirx.PrimExpr) -> None:
        """All panels, on several threads when there is enough to do."""
        weight_bytes, row_flops = (
            4 * self.gemm.k * self.gemm.n * self.gemm.weights,
            2 * self.panels * self.gemm.k * self.gemm.panel,
        )
        body = self._static_panel if isinstance(m, int) else self._symbolic_panel

        def loop(kind: Callable) -> None:
            with kind(self.panels) as panel:
                body(panel, m)

        if (
            weight_bytes >= tiles.PARALLEL_BYTES
            or isinstance(m, int)
            and row_flops * m >= tiles.PARALLEL_FLOPS
        ):
            loop(T.parallel)
        elif isinstance(m, int):
            loop(T.serial)
        else:
            with T.If(m >= int(tiles.PARALLEL_FLOPS / row_flops)):
                with T.Then():
                    loop(T.parallel)
                with T.Else():
                    loop(T.serial)

    def _static_panel(self, panel: tirx.PrimExpr, m: int) -> None:
        if m <= self.tile.streams[-1]:
            self._stream(panel, list(range(m)))
            return
        parts = tiles.partition(m, self.tile.rows)
        total, first_tile, first_row = sum(count for count, _ in parts), 0, 0
        for count, height in parts:
            with T.serial(count) as i:
                rows = [first_row + i * height + r for r in range(height)]
                self._shared(panel, rows, first_tile + i, total)
            first_tile, first_row = first_tile + count, first_row + count * height

    def _symbolic_panel(self, panel: tirx.PrimExpr, m: tirx.PrimExpr) -> None:
        def streams(heights: Sequence[int]) -> None:
            if not heights:
                rows = self.tile.rows
                count = T.ceildiv(m, rows)
                with T.serial(count) as i:
                    start = T.bind(T.min(i * rows, m - rows))
                    self._shared(panel, [start + r for r in range(rows)], i, count)
                return
            with T.If(m <= heights[0]):
                with T.Then():
                    self._stream(panel, [T.bind(T.min(r, m - 1)) if r else 0 for r in range(heights[0])])
                with T.Else():
                    streams(heights[1:])

        streams(self.tile.streams)

    def _stream(self, panel: tirx.PrimExpr, rows: Sequence[tirx.PrimExpr]) -> None:
        """The only tile of a panel."""
        ahead = tiles.STREAM_AHEAD // (4 * self.gemm.panel)
        accumulators = self._zeros(len(rows))
        with T.serial(self.gemm.k) as k:
            for column in range(0, self.gemm.panel, self.line):
                self._prefetch(panel, k + ahead, column)
            self._multiply(accumulators, panel, rows, k)
        self._epilogue(accumulators, panel, rows)

    def _shared(
        self, panel: tirx.PrimExpr, rows: Sequence[tirx.PrimExpr], tile: tirx.PrimExpr, count: tirx.PrimExpr
    ) -> None:
        """Tile number ``tile`` of the ``count`` that read the panel; it prefetches as large a part of the next one."""
        accumulators = self._zeros(len(rows))
        chunks, rest = divmod(self.gemm.k, CHUNK)
        lines_a_step = self.gemm.panel // self.line
        share = T.ceildiv(CHUNK * lines_a_step, count)

        def prefetch(chunk: tirx.PrimExpr, line: tirx.PrimExpr) -> None:
            number = (tile * chunks + chunk) * share + line
            self._prefetch(panel + 1, number // lines_a_step, number % lines_a_step * self.line)

        with T.serial(chunks) as chunk:
            if isinstance(count, int):
                for line in range(-(-CHUNK * lines_a_step // count)):
                    prefetch(chunk, line)
            else:
                with T.serial(share) as line:
                    prefetch(chunk, line)
            with T.serial(CHUNK) as k:
                self._multiply(accumulators, panel, rows, chunk * CHUNK + k)
        with T.serial(rest) as k:
            self._multiply(accumulators, panel, rows, chunks * CHUNK + k)
        self._epilogue(accumulators, panel, rows)

    def _zeros(self, rows: int) -> list[tirx.Buffer]:
        # One buffer a row: TVM keeps only allocations below 1 kB on the stack, and LLVM only those in registers.
        buffers = [T.alloc_buffer((self.vectors * self.lanes,), scope="global") for _ in range(rows)]
        for buffer in buffers:
            for v in range(self.vectors):
                T.buffer_store(buffer, T.broadcast(T.float32(0), self.lanes), [self._vector(v)])
        return buffers

    def _vector(self, v: int, base: tirx.PrimExpr | int = 0) -> tirx.PrimExpr:
        return T.ramp(base + v * self.lanes, 1, self.lanes)

    def _multiply(
        self,
        accumulators: list[tirx.Buffer],
        panel: tirx.PrimExpr,
        rows: Sequence[tirx.PrimExpr],
        k: tirx.PrimExpr,
    ) -> None:
        for row, buffer in zip(rows, accumulators, strict=True):
            for v in range(self.vectors):
                product_ = T.broadcast(self.a[row, k], self.lanes) * self.w[panel, k, self._vector(v)]
                T.buffer_store(buffer, buffer[self._vector(v)] + product_, [self._vector(v)])

    def _prefetch(self, panel: tirx.PrimExpr, k: tirx.PrimExpr, column: tirx.PrimExpr) -> None:
        # Addresses past the end are harmless: a prefetch never faults.
        address = T.address_of(self.w[panel, k, column])
        T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch.p0", address, 0, 3, 1))

    def _epilogue(
        self, accumulators: list[tirx.Buffer], panel: tirx.PrimExpr, rows: Sequence[tirx.PrimExpr]
    ) -> None:
        """Apply the chain and store; the last panel may be narrower than the others."""
        full, tail = divmod(self.gemm.n, self.gemm.columns)
        if not tail:
            self._store(accumulators, panel, rows, self.gemm.columns)
            return
        with T.If(panel < full):
            with T.Then():
                self._store(accumulators, panel, rows, self.gemm.columns)
            with T.Else():
                self._store(accumulators, panel, rows, tail)

    def _store(
        self, accumulators: list[tirx.Buffer], panel: tirx.PrimExpr, rows: Sequence[tirx.PrimExpr], width: int
    ) -> None:
        """``width`` columns of a panel, the last vector masked where they are not whole vectors."""
        for v in range(-(-width // self.lanes)):
            columns = self._vector(v, panel * self.gemm.columns)
            left = width - v * self.lanes
            mask = None if left >= self.lanes else T.ramp(0, 1, self.lanes) < T.broadcast(left, self.lanes)
            shared = {
                i: T.bind(self._load(buffer, columns, mask))
                for i, (value, buffer) in enumerate(self.others)
                if value.kind == "column"
            }
            for row, accumulator in zip(rows, accumulators, strict=True):
                values = [
                    accumulator[self._vector(w * self.vectors // self.gemm.weights + v)]
                    for w in range(self.gemm.weights)
                ]
                for i, (value, buffer) in enumerate(self.others):
                    if value.kind == "column":
                        values.append(shared[i])
                    elif value.kind == "full":
                        values.append(self._load(buffer, columns, mask, row))
                    elif value.kind == "row":
                        values.append(T.broadcast(buffer[row, 0], self.lanes))
                    else:
                        values.append(T.broadcast(buffer[()], self.lanes))
                for output, value in zip(self.outputs, evaluate_chain(self.gemm.chain, values), strict=True):
                    if mask is None:
                        T.buffer_store(output, value, [row, columns])
                    else:
                        T.evaluate(T.masked_store(output, value, row, columns, mask))

    def _load(
        self, buffer: tirx.Buffer, columns: tirx.PrimExpr, mask: tirx.PrimExpr | None, *row: tirx.PrimExpr
    ) -> tirx.PrimExpr:
        if mask is None:
            return buffer[(*row, columns)]
        return T.masked_load(f"{buffer.dtype}x{self.lanes}", buffer, *row, columns, mask)
