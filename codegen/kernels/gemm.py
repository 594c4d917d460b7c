"""Packed GEMM with a composed epilogue: ``out = chain(a @ w.T, ...)`` for constant, packed weights ``w``.

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
from typing import Any, Literal, NamedTuple

import numpy as np
from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from tersor.codegen.kernels import loops
from tersor.codegen.kernels.arguments import function
from tersor.codegen.kernels.base import TensorSpec
from tersor.codegen.kernels.chain import PLAIN, Chain, ChainInput, split_starts
from tersor.codegen.kernels.evaluate import evaluate_chain, output_dtypes
from tersor.codegen.kernels.inner_product import (
    ACCUMULATORS,
    WEIGHTS,
    InnerProduct,
    inner_product,
    stored_words,
)
from tersor.codegen.kernels.math import cast
from tersor.codegen.kernels.prepare import is_prepared, prepared
from tersor.codegen.kernels.register_tile import RegisterTile, ScaledSums
from tersor.codegen.packing import Words, packed
from tersor.codegen.tiles import (
    BLOCK_ROWS,
    CACHE_LINE,
    PARALLEL_BYTES,
    PARALLEL_FLOPS,
    GemmTile,
    choose,
    partition,
)
from tersor.codegen.tuning import recorded_tile
from tersor.ir.dims import Dim, Shape, product
from tersor.ir.opset.quantization import SMALLEST_GROUP
from tersor.targets import Target

CHUNK = 16
"""Steps of k between two groups of prefetches in a tile that shares its panel with others."""

LONG_CHUNK = 64
"""About the same where ``product.assembly`` runs them: a chunk begins with loads that it has to wait for."""

SHORT_CHAIN = 2
"""Steps of a chain up to which the epilogue of a tile is unrolled."""


@dataclass(frozen=True)
class Gemm:
    """``out[*lead, n] = chain(a[*lead, k] @ w[n, k].T, ...)``.

    dtype: that of ``a``. "float32" (times f32 weights, accumulators f32), "bfloat16" (times bf16, accumulators f32),
    "float16" (times fp16, accumulators f32 of sums of `PIECE` products in fp16) or "uint8" (times int8, accumulators
    int32, exact modulo 2**32). The outputs have the dtypes of the chain's.
    stored: "float16" for float32 times fp16 weights, products and sums in f32; None for the weights named above.
    groups: codes (uint8) have a scale for every such equal part of k, of whole `SMALLEST_GROUP`s, and stand for the
    scale times the code less 128. Accumulators are the f32 sums over the parts, each summed in int32 and then scaled.

    ``panel`` is the width of a packed panel: ``tiles.panel_width(target)``. ``weights`` matrices of equal shape are
    packed together (``packing.pack``), and each has an accumulator: the chain's first ``weights`` inputs. So
    ``silu(a @ gate.T) * (a @ up.T)`` is one kernel. The chain may have several outputs, all [*lead, n].

    Arguments: a, packed weights, the scales [*lead, groups] where there are groups, the chain's other inputs in order
    ("full" [*lead, n], "column" [n], "row" [*lead, 1], "scalar" ()); then the outputs, which must not overlap any
    input.

    ``words`` is how the weights' elements are gathered: ``inner_product.stored_words(dtype, target, groups)``. Where
    ``prepares`` says so, a is what `Prepare` makes of it.
    ValueError when dtype, chain, panel, weights and groups do not fit together.
    """

    lead: Shape
    k: int
    n: int
    chain: Chain = PLAIN
    panel: int = 32
    weights: int = 1
    dtype: Literal["float32", "bfloat16", "float16", "uint8"] = "float32"
    words: Words | None = None
    stored: Literal["float16"] | None = None
    groups: int | None = None

    def __post_init__(self) -> None:
        kinds = [value.kind for value in self.chain.inputs]
        if kinds.count("accumulator") != self.weights or "accumulator" in kinds[self.weights :]:
            raise ValueError(
                f"the chain of a GEMM with {self.weights} weights starts with as many accumulators: {kinds}"
            )
        accumulator = "float32" if self.groups else ACCUMULATORS[self.dtype]
        if any(value.dtype != accumulator for value in self.chain.inputs[: self.weights]):
            raise ValueError(f"the accumulators of a {self.dtype} GEMM are {accumulator}")
        if self.groups and (self.dtype != "uint8" or self.k % (self.groups * SMALLEST_GROUP)):
            raise ValueError(f"{self.k} numbers of {self.dtype} are not {self.groups} groups of codes")
        if self.stored and self.dtype != "float32":
            raise ValueError(f"{self.dtype} is not multiplied by {self.stored}, float32 is")
        if self.panel % self.weights:
            raise ValueError(f"a panel of {self.panel} columns cannot hold {self.weights} weights")

    @property
    def columns(self) -> int:
        """Output columns of a panel."""
        return self.panel // self.weights

    @property
    def panels(self) -> int:
        """How many panels the weights are packed into."""
        return -(-self.n // self.columns)

    @property
    def rows(self) -> int | Dim:
        """Rows of the product: all leading dimensions together."""
        return product(self.lead)

    @property
    def prepares(self) -> bool:
        """Whether a is what `Prepare` makes of it."""
        return is_prepared(self.words, self.dtype)

    @property
    def left(self) -> TensorSpec:
        """What a is."""
        if self.prepares:
            return prepared(self.lead, self.k, self.words, self.dtype)
        return TensorSpec((*self.lead, self.k), self.dtype)

    def name(self) -> str:
        parts = ["gemm"] + ([self.dtype] if self.dtype != "float32" else [])
        parts += ([f"by_{self.stored}"] if self.stored else []) + [f"{self.k}x{self.n}"]
        parts += [str(self.rows)] if isinstance(self.rows, int) else []
        parts += [f"w{self.weights}"] if self.weights > 1 else []
        parts += [f"g{self.groups}"] if self.groups else []
        return "_".join(parts + ([self.chain.label()] if self.chain.steps else []))

    def inputs(self) -> tuple[TensorSpec, ...]:
        shapes = {"full": (*self.lead, self.n), "column": (self.n,), "row": (*self.lead, 1), "scalar": ()}
        weight = self.stored or WEIGHTS[self.dtype]
        return (
            self.left,
            TensorSpec(*packed(self.n, self.k, weight, self.panel, self.weights, self.words)),
            *([TensorSpec((*self.lead, self.groups))] if self.groups else []),
            *(TensorSpec(shapes[v.kind], v.dtype) for v in self.chain.inputs[self.weights :]),
        )

    def outputs(self) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec((*self.lead, self.n), dtype) for dtype in output_dtypes(self.chain))

    def build(self, target: Target, tile: GemmTile | None = None) -> tirx.PrimFunc:
        """The scheduled function; ``tile`` overrides the chosen one. ValueError for another target's panel or dtype."""
        product = inner_product(self.dtype, target, self.stored)
        if self.columns % product.lanes:
            raise ValueError(f"{self.columns} columns a panel are not whole vectors of {product.lanes}")
        if self.words != stored_words(self.dtype, target, self.groups):
            raise ValueError(f"weights for {target.name} are packed as {product.words}, not {self.words}")
        tile = tile or recorded_tile(self, target) or choose(target, self.panels, product)
        return _Builder(self, product, tile, target).function()


class _Rows(NamedTuple):
    """The rows of one register tile: ``at(r)`` is the row of the matrix that the tile's row r < height works on."""

    height: int
    at: Callable[[Expr | int], Expr | int]


class _Builder:
    """Emits one kernel; the attributes are what every part of it refers to."""

    def __init__(self, gemm: Gemm, product: InnerProduct, tile: GemmTile, target: Target):
        self.gemm, self.product, self.tile, self.target = gemm, product, tile, target
        self.lanes = product.lanes
        self.vectors = gemm.panel // product.lanes
        self.panels = gemm.panels
        # a column that is added to sums of integers is what they start from; of whole panels it has all vectors
        self.starts, self.chain = ((), gemm.chain) if gemm.n % gemm.columns else split_starts(gemm.chain)
        self.words = gemm.k // product.factor  # complete ones
        self.tail = gemm.k % product.factor > 0
        if gemm.prepares:  # rows are filled up with zeros
            self.words, self.tail = self.words + self.tail, False
        # of k, each summed by itself before anything is done to the sums, and the complete words of one
        self.parts = gemm.groups or 1
        self.part = self.words // self.parts
        weights = gemm.inputs()[1]
        self.width = weights.shape[2]
        self.bytes = np.dtype(weights.dtype).itemsize  # of a number of the packed weights
        self.line = CACHE_LINE // self.bytes

    def function(self) -> tirx.PrimFunc:
        gemm = self.gemm
        names = [f"{value.kind}_{i}" for i, value in enumerate(gemm.chain.inputs[gemm.weights :])]
        with function(gemm.name()) as (builder, arguments):
            names = ["a", "w", *(["scales"] if gemm.groups else []), *names]
            a, self.w, *others = (
                arguments.declare(name, spec) for name, spec in zip(names, gemm.inputs(), strict=True)
            )
            outputs = [arguments.declare(f"out_{i}", spec) for i, spec in enumerate(gemm.outputs())]
            self.a = self.product.matrix(arguments.flatten(a))
            if gemm.groups:
                self.scales = arguments.flatten(others.pop(0))
            self.others = [
                (value, arguments.flatten(buffer) if value.kind in ("full", "row") else buffer)
                for value, buffer in zip(gemm.chain.inputs[gemm.weights :], others, strict=True)
            ]
            self.outputs = [arguments.flatten(buffer) for buffer in outputs]
            with self.product.body():
                self._schedule(arguments.size(gemm.lead))
        return builder.get()

    def _schedule(self, m: int | Expr) -> None:
        """All panels, on several threads when there is enough to do."""
        stored = self.panels * (self.words + self.tail) * self.width
        weight_bytes = self.bytes * stored
        row_flops = 2 * stored  # in f32's time: a word counts as one multiplication whatever it holds
        if isinstance(m, int):
            large = weight_bytes >= PARALLEL_BYTES or row_flops * m >= PARALLEL_FLOPS
            self._tasks(T.parallel if large else T.serial, m)
        elif weight_bytes >= PARALLEL_BYTES:
            self._tasks(T.parallel, m)
        else:
            with T.If(m >= int(PARALLEL_FLOPS / row_flops)):
                with T.Then():
                    self._tasks(T.parallel, m)
                with T.Else():
                    self._tasks(T.serial, m)

    def _tasks(self, loop: Callable[..., Any], m: int | Expr) -> None:
        """One task is one panel, for all rows or for one block of them."""
        blocks = self.tile.blocks
        if blocks > 1:
            enough = m >= blocks * BLOCK_ROWS
            blocks = (blocks if enough else 1) if isinstance(m, int) else T.Select(enough, blocks, 1)
        with loop(blocks * self.panels) as task:
            panel, block = (task, 0) if _is_one(blocks) else (task % self.panels, task // self.panels)
            if isinstance(m, int):
                self._static_rows(panel, m, block, blocks)
            else:
                self._symbolic_rows(panel, m, block, blocks)

    def _static_rows(self, panel: Expr, m: int, block: Expr | int, blocks: int) -> None:
        step = self.product.block[0]
        whole = -(-m // step) * step

        def rows(height: int, start: Expr | int) -> _Rows:
            return _Rows(height, (lambda r: start + r) if whole == m else lambda r: T.min(start + r, m - 1))

        if m <= self.tile.streams[-1]:
            self._stream(panel, rows(whole, 0))
            return
        parts = [(count, height * step) for count, height in partition(whole // step, self.tile.rows // step)]
        total = sum(count for count, _ in parts)
        first_tile, first_row = 0, 0
        for count, height in parts:
            with _share_of(block, blocks, total, first_tile, first_tile + count) as i:
                start = first_row + (i - first_tile) * height
                self._shared(panel, rows(height, start), i, total)
            first_tile, first_row = first_tile + count, first_row + count * height

    def _symbolic_rows(self, panel: Expr, m: Expr, block: Expr | int, blocks: Expr | int) -> None:
        pairs = self.product.pairs
        whole = T.bind((m + 1) // 2 * 2) if pairs else m

        def last(r: Expr | int) -> Expr:
            """Row r of a tile that begins with row 0, or the last one that has the same place in a pair."""
            return T.min(T.min(r // 2 * 2, whole - 2) + r % 2, m - 1) if pairs else T.min(r, m - 1)

        def streams(heights: Sequence[int]) -> None:
            if not heights:
                rows = self.tile.rows
                total = T.ceildiv(m, rows)
                with _share_of(block, blocks, total, 0, total) as i:
                    start = T.bind(T.min(i * rows, whole - rows))
                    at = (lambda r: T.min(start + r, m - 1)) if pairs else lambda r: start + r
                    self._shared(panel, _Rows(rows, at), i, total)
                return
            with T.If(m <= heights[0]):
                with T.Then():
                    self._stream(panel, _Rows(heights[0], last))
                with T.Else():
                    streams(heights[1:])

        streams(self.tile.streams)

    def _stream(self, panel: Expr, rows: _Rows) -> None:
        """The only tile of a panel."""
        ahead = self.tile.ahead // (self.bytes * self.width)
        together = self.product.group

        def run(sums: RegisterTile, group: Expr | int) -> None:
            first = group * self.part
            if self.product.assembly:
                self._loop(sums, panel, rows, first, self.part, self.tile.ahead)
                return
            with T.serial(self.part // together) as i:
                for number in range(max(together * self.width // self.line, 1)):
                    word, column = self._line(number)
                    self._prefetch(panel, first + i * together + (ahead + word), column)
                sums.multiply(first + i * together, together, *self._operands(panel, rows))
            self._rest(sums, panel, rows, first, self.part // together * together)

        self._epilogue(self._products(panel, rows, run), panel, rows)

    def _shared(self, panel: Expr, rows: _Rows, tile: Expr, count: Expr | int) -> None:
        """One of the ``count`` tiles that read the panel; it prefetches as large a part of the next one."""
        size = self._chunk()
        chunks = self.part // size
        lines = size * self.width // self.line
        share = -(-lines // count) if isinstance(count, int) else T.ceildiv(lines, count)

        def run(sums: RegisterTile, group: Expr | int) -> None:
            first = group * self.part
            with T.serial(chunks) as chunk:
                number = (tile * self.parts + group) * chunks + chunk
                with (T.unroll if isinstance(count, int) else T.serial)(share) as line:
                    self._prefetch(panel + 1, *self._line(number * share + line))
                if self.product.assembly:
                    self._loop(sums, panel, rows, first + chunk * size, size)
                else:
                    sums.accumulate(first + chunk * size, size, *self._operands(panel, rows))
            done = chunks * size
            if self.product.assembly:
                self._loop(sums, panel, rows, first + done, self.part - done)
            else:
                self._rest(sums, panel, rows, first, done)

        self._epilogue(self._products(panel, rows, run), panel, rows)

    def _chunk(self) -> int:
        """Words between two groups of prefetches."""
        if not self.product.assembly:
            return CHUNK
        if self.product.assembly.piece:
            return min(self.product.assembly.piece, self.words)
        group = self.product.group  # equal parts leave no rest, where whole vectors allow it
        return max(self.part // group // max(self.part // LONG_CHUNK, 1), 1) * group

    def _products(
        self, panel: Expr, rows: _Rows, run: Callable[[RegisterTile, Expr | int], None]
    ) -> RegisterTile | ScaledSums:
        """The accumulators of a tile; ``run(sums, group)`` adds the products of one part of k to sums."""
        if not self.gemm.groups:
            sums = self._sums(panel, rows)
            run(sums, 0)
            return sums
        totals = ScaledSums(rows.height, self.vectors, self.lanes)
        with T.serial(self.parts) as group:
            sums = self._sums(panel, rows, group)
            run(sums, group)
            totals.add(sums, lambda r: self.scales[rows.at(r), group])
        return totals

    def _loop(
        self,
        sums: RegisterTile,
        panel: Expr,
        rows: _Rows,
        first: Expr | int,
        words: int,
        ahead: int | None = None,
    ) -> None:
        """The products of so many words from ``first`` on; all of them are complete."""

        def run(start: Expr | int, count: int) -> None:
            right = T.address_of(self.w[panel, start, 0])
            left = lambda r: self.product.address(self.a, self._block(rows, r), start)  # noqa: E731
            sums.stream(count, left, right, ahead)

        piece = self.product.assembly.piece or words
        if words > piece:
            with T.serial(words // piece) as i:
                run(first + i * piece, piece)
            first, words = first + words // piece * piece, words % piece
        if words:
            run(first, words)

    def _sums(self, panel: Expr, rows: _Rows, group: Expr | int = 0) -> RegisterTile:
        """The sums of a tile, or of one of its groups. They start from what the chain adds to them first, and from what
        words of the other sign than is asked for leave out (`Words.sums`)."""
        each = self.vectors // self.gemm.weights
        owed = self.gemm.words is not None and self.gemm.words.sums > 0

        def start(r: int, v: int) -> Expr:
            parts = []
            if owed:
                sums = self.w[panel, self.words + self.tail + group, self._vector(v)]
                parts = [tirx.const(0, f"int32x{self.lanes}") - sums if self.gemm.groups else sums]
            if self.starts:
                _, column = self.others[self.starts[v // each] - self.gemm.weights]
                parts.append(column[self._vector(v % each, panel * self.gemm.columns)])
            return sum(parts[1:], parts[0])

        return RegisterTile(rows.height, self.vectors, self.product, start if owed or self.starts else None)

    def _rest(self, sums: RegisterTile, panel: Expr, rows: _Rows, first: Expr | int, done: int) -> None:
        """The words of a part that are not ``done``, and the elements of k behind them that do not fill one."""
        left, right = self._operands(panel, rows)
        sums.accumulate(first + done, self.part - done, left, right)
        if self.tail:  # the weights' words are padded with zeros
            k = self.gemm.k
            sums.multiply(self.words, 1, lambda r, *_: self.product.last_word(self.a, rows.at(r), k), right)

    def _line(self, number: Expr | int) -> tuple[Expr | int, Expr | int]:
        """Word and column where a line of a panel begins."""
        if self.width < self.line:
            return number * (self.line // self.width), 0
        lines = self.width // self.line
        return number // lines, number % lines * self.line

    def _vector(self, v: int, base: Expr | int = 0) -> Expr:
        return T.ramp(base + v * self.lanes, 1, self.lanes)

    def _operands(self, panel: Expr, rows: _Rows) -> tuple[Callable, Callable]:
        """How a `RegisterTile` reads both matrices."""

        def left(r: int, k: Expr, count: int) -> Expr:
            return self.product.word(self.a, self._block(rows, r), k, count)

        return left, lambda v, k: self.w[panel, k, self._vector(v)]

    def _block(self, rows: _Rows, r: int) -> Expr | int:
        """The row, or pair of rows, of the left matrix that block r of a tile works on."""
        return rows.at(r * 2) // 2 if self.product.pairs else rows.at(r)

    def _prefetch(self, panel: Expr, k: Expr, column: Expr | int) -> None:
        loops.prefetch(self.w, panel, k, column)

    def _epilogue(self, sums: RegisterTile | ScaledSums, panel: Expr, rows: _Rows) -> None:
        """Apply the chain and store; the last panel may be narrower than the others."""
        full, tail = divmod(self.gemm.n, self.gemm.columns)
        if not tail:
            self._store(sums, panel, rows, self.gemm.columns)
        elif not full:
            self._store(sums, panel, rows, tail)
        else:
            with T.If(panel < full):
                with T.Then():
                    self._store(sums, panel, rows, self.gemm.columns)
                with T.Else():
                    self._store(sums, panel, rows, tail)

    def _store(self, sums: RegisterTile | ScaledSums, panel: Expr, rows: _Rows, width: int) -> None:
        """``width`` columns of a panel, the last vector masked where they are not whole vectors."""
        # Short chains stay in registers; a loop keeps the code of long ones small, at no cost in time.
        loop = T.unroll if len(self.chain.steps) <= SHORT_CHAIN else T.serial
        lanes = self._vector(0)
        for v in range(-(-width // self.lanes)):
            columns = self._vector(v, panel * self.gemm.columns)
            mask = None
            if width < (v + 1) * self.lanes:
                mask = loops.mask(width - v * self.lanes, self.lanes)
            accumulators = [
                sums.column(w * self.vectors // self.gemm.weights + v) for w in range(self.gemm.weights)
            ]
            with loop(rows.height) as r:
                row = rows.at(r)
                values = [buffer[r, lanes] for buffer in accumulators]
                values += [self._input(value, buffer, row, columns, mask) for value, buffer in self.others]
                results = evaluate_chain(self.chain, values, self.target)
                for output, result in zip(self.outputs, results, strict=True):
                    loops.store_at(output, [row, columns], cast(result, output.dtype), mask)

    def _input(
        self, value: ChainInput, buffer: tirx.Buffer, row: Expr | int, columns: Expr, mask: Expr | None
    ) -> Expr:
        """A vector of one of the chain's other inputs."""
        if value.kind == "scalar":
            return T.broadcast(buffer[()], self.lanes)
        if value.kind == "row":
            return T.broadcast(buffer[row, 0], self.lanes)
        place = (row, columns) if value.kind == "full" else (columns,)
        if mask is None:
            return buffer[place]
        return T.masked_load(f"{value.dtype}x{self.lanes}", buffer, *place, mask)


def _share_of(
    block: Expr | int, blocks: Expr | int, total: Expr | int, first: Expr | int, last: Expr | int
) -> Any:
    """A loop over those tiles first <= i < last that belong to one of the blocks into which ``total`` tiles are cut."""
    if _is_one(blocks):
        return T.serial(first, last)
    size = T.ceildiv(total, blocks)
    start = T.bind(T.max(block * size, first))
    return T.serial(start, T.max(start, T.min((block + 1) * size, last)))


def _is_one(count: Expr | int) -> bool:
    return isinstance(count, int) and count == 1
