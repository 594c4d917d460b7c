"""Attention on merged heads: scores, softmax and weighted sum of a few query rows at a time, never all the scores.

Per batch element and head, K is transposed (and scaled) into vectors of keys, and V is copied so that its rows follow
each other. Then, for a tile of query rows: scores for all keys the tile may see, with the mask as the accumulators'
start; softmax of each row; product with V, divided by the row's sum. The scores of one tile stay in L1 or L2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from tersor.codegen.kernels import loops, math
from tersor.codegen.kernels.arguments import Arguments
from tersor.codegen.kernels.base import TensorSpec
from tersor.codegen.kernels.inner_product import inner_product
from tersor.codegen.kernels.register_tile import RegisterTile
from tersor.codegen.tiles import PANEL_VECTORS, PARALLEL_FLOPS, most_rows
from tersor.ir.dims import Dim, Shape
from tersor.targets import Target

LOWEST = -3.4028234663852886e38
"""The lowest finite f32. No score is below it but -inf, so with it as the least maximum a masked key weighs 0."""


@dataclass(frozen=True)
class Attention:
    """``softmax(q k^T * scale + mask) v`` for every head, in f32.

    q [batch, q_len, heads*head_dim], k [batch, kv_len, kv_heads*head_dim], v [batch, kv_len, kv_heads*value_dim] ->
    [batch, q_len, heads*value_dim]. Query head h reads key/value head ``h // (heads // kv_heads)``.

    packed: how the arguments lie. "": q, k, v. "qkv": one input [batch, length, (heads+kv_heads)*head_dim +
    kv_heads*value_dim] with the columns of q, k, v in this order. "kv": q, then one input with the columns of k, v.
    mask: the shape of a further input that broadcasts to [batch, heads, q_len, kv_len] (at most 4-d, each dim full
    or 1), or None. mask_dtype "bool" (true = attend) or "float32" (added to the scores).
    causal: query i sees keys j <= i + offset, where offset is kv_len - q_len for align "end" and 0 for "start".
    window: of those, query i sees only j > i + offset - window.
    softcap: scores before the mask become ``softcap * tanh(score / softcap)``, or None.
    A query that sees no key gives zeros, as torch's scaled_dot_product_attention does.

    ValueError when heads are not a multiple of kv_heads, or a packed or mask shape cannot be.
    """

    batch: int | Dim
    q_len: int | Dim
    kv_len: int | Dim
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    scale: float
    causal: bool = False
    mask: Shape | None = None
    mask_dtype: Literal["bool", "float32"] = "bool"
    window: int | None = None
    align: Literal["end", "start"] = "end"
    packed: Literal["", "qkv", "kv"] = ""
    softcap: float | None = None

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads cannot share {self.kv_heads} key/value heads")
        if self.packed == "qkv" and self.q_len != self.kv_len:
            raise ValueError(f"q, k and v in one input have one length, not {self.q_len} and {self.kv_len}")
        full = (self.batch, self.heads, self.q_len, self.kv_len)
        if self.mask is not None and (
            len(self.mask) > 4 or any(m not in (1, f) for m, f in zip(self.full_mask, full, strict=True))
        ):
            raise ValueError(f"a mask of shape {self.mask} does not broadcast to {full}")

    @property
    def full_mask(self) -> Shape:
        """The mask's shape with all four dimensions."""
        return (1,) * (4 - len(self.mask or ())) + (self.mask or ())

    def name(self) -> str:
        parts = ["attention", f"{self.heads}x{self.head_dim}"]
        parts += [f"kv{self.kv_heads}"] if self.kv_heads != self.heads else []
        parts += ["causal"] if self.causal else []
        parts += [f"window{self.window}"] if self.window is not None else []
        parts += ["softcap"] if self.softcap is not None else []
        parts += [f"mask_{self.mask_dtype}"] if self.mask is not None else []
        return "_".join(parts)

    def inputs(self) -> tuple[TensorSpec, ...]:
        q, k, v = self.heads * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * self.value_dim
        query, key = (self.batch, self.q_len), (self.batch, self.kv_len)
        specs = {
            "": ((*query, q), (*key, k), (*key, v)),
            "qkv": ((*query, q + k + v),),
            "kv": ((*query, q), (*key, k + v)),
        }[self.packed]
        mask = (TensorSpec(self.mask, self.mask_dtype),) if self.mask is not None else ()
        return (*(TensorSpec(shape) for shape in specs), *mask)

    def outputs(self) -> tuple[TensorSpec, ...]:
        return (TensorSpec((self.batch, self.q_len, self.heads * self.value_dim)),)

    def build(self, target: Target) -> tirx.PrimFunc:
        return _Builder(self, target).function()


@dataclass(frozen=True)
class _Rows:
    """A flat buffer of rows in which an operand occupies some columns."""

    buffer: tirx.Buffer
    stride: int
    column: int = 0


class _Builder:
    """Emits one kernel; the attributes are what every part of it refers to."""

    def __init__(self, attention: Attention, target: Target):
        self.spec = attention
        self.product = inner_product("float32", target)
        self.lanes = self.product.lanes
        self.rows = min(8, most_rows(target))
        self.ramp = T.ramp(0, 1, self.lanes)
        self.value_vectors = -(-attention.value_dim // self.lanes)
        batch = attention.batch if isinstance(attention.batch, int) else 1
        self.parts = _parts(batch * attention.heads, target.cores or 4)

    def function(self) -> tirx.PrimFunc:
        spec = self.spec
        with IRBuilder() as builder:
            with T.prim_func(s_tir=True):
                T.func_name(spec.name())
                T.func_attr({"tirx.noalias": True})
                arguments = Arguments()
                inputs = [arguments.declare(f"in_{i}", s) for i, s in enumerate(spec.inputs())]
                out = arguments.declare("out", spec.outputs()[0])
                self.batch, self.q_len, self.kv_len = arguments.extents((spec.batch, spec.q_len, spec.kv_len))
                inputs, out = [loops.flat(b) for b in inputs], loops.flat(out)
                self.mask = inputs.pop() if spec.mask is not None else None
                self.q, self.k, self.v = self._operands(inputs)
                self.out = _Rows(out, spec.heads * spec.value_dim)
                self.offset = self.kv_len - self.q_len if spec.align == "end" else 0
                self.blocks = _ceil_div(self.kv_len, self.lanes)
                work = self.batch * self.q_len * self.kv_len * (spec.heads * (spec.head_dim + spec.value_dim))
                loops.when_large(2 * work, PARALLEL_FLOPS, self._parallel, self._serial)
        return builder.get()

    def _operands(self, inputs: list[tirx.Buffer]) -> list[_Rows]:
        spec = self.spec
        widths = [spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim, spec.kv_heads * spec.value_dim]
        groups = {"": [[0], [1], [2]], "qkv": [[0, 1, 2]], "kv": [[0], [1, 2]]}[spec.packed]
        operands = []
        for buffer, members in zip(inputs, groups, strict=True):
            stride, column = sum(widths[m] for m in members), 0
            for member in members:
                operands.append(_Rows(buffer, stride, column))
                column += widths[member]
        return operands

    def _serial(self) -> None:
        with T.serial(self.batch * self.spec.heads) as head:
            self._head(head)

    def _parallel(self) -> None:
        """Heads over threads; where they do not divide evenly, each in a few parts that pack the same keys."""
        tasks = self.batch * self.spec.heads
        with T.parallel(tasks * self.parts) as task:
            if self.parts == 1:
                self._head(task)
            else:
                self._head(tirx.floordiv(task, self.parts), tirx.floormod(task, self.parts))

    def _head(self, index: Expr, part: Expr | None = None) -> None:
        """One head of one batch element: all its query rows, or one of ``parts`` runs of them."""
        spec = self.spec
        batch = math.bind(tirx.floordiv(index, spec.heads))
        head = math.bind(tirx.floormod(index, spec.heads))
        group = math.bind(tirx.floordiv(head, spec.heads // spec.kv_heads))
        self.keys = T.alloc_buffer((self.blocks, spec.head_dim, self.lanes))
        self.values = T.alloc_buffer((self.kv_len, self.value_vectors * self.lanes))
        self.scores = T.alloc_buffer((self.rows, self.blocks * self.lanes))
        self.maxima = T.alloc_buffer((self.rows, self.lanes))
        self.inverses = T.alloc_buffer((self.rows,))
        self._pack_keys(batch, group)
        self._pack_values(batch, group)
        self.bias = self._key_bias(batch, head)
        if isinstance(self.q_len, int) and part is None:
            whole, rest = divmod(self.q_len, self.rows)
            if whole:
                with T.serial(whole) as tile:
                    self._tile(batch, head, tile * self.rows, self.rows)
            if rest:
                self._tile(batch, head, whole * self.rows, rest)
            return
        count = _ceil_div(self.q_len, self.rows)
        first, last = 0, count
        if part is not None:
            share = _ceil_div(count, self.parts)
            first, last = part * share, tirx.min((part + 1) * share, count)
        with T.serial(tirx.max(last - first, 0)) as tile:
            self._tile(batch, head, (first + tile) * self.rows, self.rows, clamp=True)

    def _pack_keys(self, batch: Expr, group: Expr) -> None:
        """keys[block, d, lane] = scale * k[block*lanes + lane, d]; the last block repeats the last key."""
        spec, lanes = self.spec, self.lanes
        scale = spec.scale if spec.softcap is None else spec.scale / spec.softcap
        whole, rest = divmod(spec.head_dim, lanes)

        def square(block: Expr, d: loops.Extent, count: int) -> None:
            where = None if count == lanes else loops.mask(count, lanes)
            vectors = []
            for i in range(lanes):
                row = batch * self.kv_len + tirx.min(block * lanes + i, self.kv_len - 1)
                at = row * self.k.stride + (self.k.column + group * spec.head_dim + d)
                vectors.append(math.bind(loops.load(self.k.buffer, at, lanes, where) * scale))
            for i, vector in enumerate(_transpose(vectors)[:count]):
                T.buffer_store(self.keys, vector, [block, d + i, self.ramp])

        with T.serial(self.blocks) as block:
            if whole:
                with T.serial(whole) as i:
                    square(block, i * lanes, lanes)
            if rest:
                square(block, whole * lanes, rest)

    def _pack_values(self, batch: Expr, group: Expr) -> None:
        spec, lanes = self.spec, self.lanes
        with T.serial(self.kv_len) as j:
            start = (batch * self.kv_len + j) * self.v.stride + (self.v.column + group * spec.value_dim)
            for i in range(self.value_vectors):
                left = spec.value_dim - i * lanes
                where = None if left >= lanes else loops.mask(left, lanes)
                vector = loops.load(self.v.buffer, start + i * lanes, lanes, where)
                T.buffer_store(self.values, vector, [j, T.ramp(i * lanes, 1, lanes)])

    def _key_bias(self, batch: Expr, head: Expr) -> tirx.Buffer | None:
        """What is added to the scores of every query alike: the mask where it has no query dimension, -inf past the
        last key. None where that is nothing or where every query has its own."""
        spec, lanes = self.spec, self.lanes
        own_rows = spec.mask is not None and spec.full_mask[2] != 1
        if own_rows or (spec.mask is None and isinstance(self.kv_len, int) and self.kv_len % lanes == 0):
            return None
        bias = T.alloc_buffer((self.blocks * lanes,))
        with T.serial(self.blocks) as block:
            T.buffer_store(bias, self._mask_vector(batch, head, 0, block), [T.ramp(block * lanes, 1, lanes)])
        return bias

    def _mask_vector(self, batch: Expr, head: Expr, query: Expr | int, block: Expr) -> Expr:
        """The mask of one query for one block of keys as a number to add; -inf past the last key."""
        spec, lanes = self.spec, self.lanes
        inside = loops.mask(self.kv_len - block * lanes, lanes)
        zero, minus_infinity = (tirx.const(c, f"float32x{lanes}") for c in (0.0, float("-inf")))
        if spec.mask is None:
            return tirx.Select(inside, zero, minus_infinity)
        position = (batch, head, query, block * lanes)
        extents = (self.batch, spec.heads, self.q_len, self.kv_len)
        along = [size != 1 for size in spec.full_mask]
        start = loops.ravel(position, extents, along)
        if spec.full_mask[3] == 1:
            value = math.broadcast(self.mask[start], lanes)
        else:
            value = loops.load(self.mask, start, lanes, inside)
        if spec.mask_dtype == "bool":
            return tirx.Select(tirx.And(inside, math.cast(value, "bool")), zero, minus_infinity)
        return tirx.Select(inside, value, minus_infinity)

    def _tile(self, batch: Expr, head: Expr, first: Expr | int, rows: int, clamp: bool = False) -> None:
        """Some query rows from ``first`` on; with ``clamp``, rows past the last one repeat it."""
        spec, lanes = self.spec, self.lanes
        queries = [tirx.min(first + r, self.q_len - 1) if clamp else first + r for r in range(rows)]
        queries = [math.bind(q) for q in queries]
        end: loops.Extent = self.kv_len  # keys from `begin` to `end` are visible to some row
        begin: loops.Extent = 0
        if spec.causal:
            end = math.bind(tirx.max(tirx.min(first + (rows + self.offset), self.kv_len), 0))
        if spec.window is not None:
            lowest = first + (self.offset - spec.window + 1)
            begin = math.bind(tirx.min(tirx.max(lowest, 0), end) // lanes * lanes)
        blocks = math.bind(_ceil_div(end, lanes))
        first_block = math.bind(begin // lanes)
        for r in range(rows):
            T.buffer_store(self.maxima, tirx.const(LOWEST, f"float32x{lanes}"), [r, self.ramp])
        # blocks that every row sees whole need no comparison with the diagonal
        if spec.window is not None:
            free = first_block
        elif spec.causal:
            free = math.bind(tirx.max(tirx.min(first + (self.offset + 1), self.kv_len) // lanes, 0))
        else:
            free = blocks
        self._score_blocks(batch, head, queries, first_block, free, diagonal=False)
        if spec.causal or spec.window is not None:
            self._score_blocks(batch, head, queries, free, blocks, diagonal=True)
        self._softmax(rows, first_block, blocks)
        self._weighted_sum(batch, head, queries, begin, end)

    def _score_blocks(self, batch, head, queries: list[Expr], begin, end, diagonal: bool) -> None:
        """Scores for the blocks begin..end-1 of keys, several at a time."""
        count = end - begin
        if isinstance(count, int):
            pairs, odd = divmod(count, PANEL_VECTORS)
            if pairs:
                with T.serial(pairs) as pair:
                    self._scores(batch, head, queries, begin + pair * PANEL_VECTORS, PANEL_VECTORS, diagonal)
            if odd:
                self._scores(batch, head, queries, begin + pairs * PANEL_VECTORS, odd, diagonal)
            return
        with T.serial(tirx.max(count, 0) // PANEL_VECTORS) as pair:
            self._scores(batch, head, queries, begin + pair * PANEL_VECTORS, PANEL_VECTORS, diagonal)
        with T.If(tirx.And(count > 0, tirx.floormod(count, PANEL_VECTORS) == 1)):
            with T.Then():
                self._scores(batch, head, queries, end - 1, 1, diagonal)

    def _scores(self, batch, head, queries: list[Expr], block: Expr, vectors: int, diagonal: bool) -> None:
        """The scores of the tile's rows for a few blocks of keys, into ``scores``; raises the rows' maxima."""
        spec, lanes = self.spec, self.lanes
        zero = tirx.const(0.0, f"float32x{lanes}")

        def mask(r: int, n: int) -> Expr:
            if self.bias is not None:
                return self.bias[T.ramp((block + n) * lanes, 1, lanes)]
            return zero if spec.mask is None else self._mask_vector(batch, head, queries[r], block + n)

        sums = RegisterTile(len(queries), vectors, self.product, mask if spec.softcap is None else None)
        rows = [
            math.bind((batch * self.q_len + q) * self.q.stride + (self.q.column + head * spec.head_dim))
            for q in queries
        ]
        with T.serial(spec.head_dim) as d:
            sums.multiply(lambda r: self.q.buffer[rows[r] + d], lambda n: self.keys[block + n, d, self.ramp])
        for r, query in enumerate(queries):
            highest = self.maxima[r, self.ramp]
            for n in range(vectors):
                score = sums.vector(r, n)
                if spec.softcap is not None:
                    score = math.bind(math.tanh(score) * spec.softcap + mask(r, n))
                if diagonal:
                    score = math.bind(self._see(score, query, block + n))
                T.buffer_store(self.scores, score, [r, T.ramp((block + n) * lanes, 1, lanes)])
                highest = tirx.max(score, highest)
            T.buffer_store(self.maxima, highest, [r, self.ramp])

    def _see(self, score: Expr, query: Expr, block: Expr) -> Expr:
        """The score, -inf where the diagonal or the window hides the key."""
        lanes, spec = self.lanes, self.spec
        # keys relative to the query's own position on the diagonal
        ahead = tirx.Cast("int32", block * lanes - (query + self.offset))
        ahead = math.bind(T.ramp(0, 1, lanes) + tirx.Broadcast(ahead, lanes))
        hidden = tirx.const(float("-inf"), f"float32x{lanes}")
        if spec.causal:
            score = tirx.Select(ahead <= 0, score, hidden)
        if spec.window is not None:
            score = tirx.Select(ahead > -spec.window, score, hidden)
        return score

    def _softmax(self, rows: int, begin, end) -> None:
        """exp(score - maximum) in place of the scores, and each row's inverse sum (0 where no key is seen)."""
        lanes = self.lanes
        with T.serial(rows) as r:
            highest = math.horizontal(tirx.max, self.maxima[r, self.ramp])
            highest = math.bind(math.broadcast(highest, lanes))
            total = T.alloc_buffer((lanes,))
            T.buffer_store(total, tirx.const(0.0, f"float32x{lanes}"), [self.ramp])
            with T.serial(end - begin) as i:
                at = T.ramp((begin + i) * lanes, 1, lanes)
                weight = math.bind(math.exp_nonpositive(self.scores[r, at] - highest))
                T.buffer_store(self.scores, weight, [r, at])
                T.buffer_store(total, total[self.ramp] + weight, [self.ramp])
            total = math.horizontal(lambda a, b: a + b, total[self.ramp])
            inverse = tirx.Select(total > 0.0, 1.0 / total, tirx.const(0.0, "float32"))
            T.buffer_store(self.inverses, inverse, [r])

    def _weighted_sum(self, batch, head, queries: list[Expr], begin, end) -> None:
        """out = weights @ values * inverse sum."""
        for first in range(0, self.value_vectors, PANEL_VECTORS):
            width = min(PANEL_VECTORS, self.value_vectors - first)
            self._weighted_vectors(batch, head, queries, begin, end, first, width)

    def _weighted_vectors(self, batch, head, queries: list[Expr], begin, end, first: int, width: int) -> None:
        """Some vectors of columns of the weighted sum."""
        spec, lanes = self.spec, self.lanes
        sums = RegisterTile(len(queries), width, self.product)
        with T.serial(end - begin) as step:
            j = begin + step
            sums.multiply(
                lambda r: self.scores[r, j], lambda n: self.values[j, T.ramp((first + n) * lanes, 1, lanes)]
            )
        for r, query in enumerate(queries):
            inverse = tirx.Broadcast(self.inverses[r], lanes)
            start = (batch * self.q_len + query) * self.out.stride + head * spec.value_dim
            for n in range(width):
                column = (first + n) * lanes
                left = spec.value_dim - column
                where = None if left >= lanes else loops.mask(left, lanes)
                loops.store(self.out.buffer, start + column, sums.vector(r, n) * inverse, lanes, where)


def _parts(tasks: int, threads: int) -> int:
    """Into how many parts to cut each of some equal tasks, so that no thread waits long for another."""
    return next(p for p in (1, 2, 4) if tasks * p % threads == 0 or tasks * p >= 4 * threads or p == 4)


def _transpose(vectors: list[Expr]) -> list[Expr]:
    """A square of vectors with rows and lanes exchanged: swaps of ever larger blocks."""
    lanes, distance = len(vectors), 1
    vectors = list(vectors)
    while distance < lanes:
        low = [i if not i & distance else lanes + i - distance for i in range(lanes)]
        high = [i + distance if not i & distance else lanes + i for i in range(lanes)]
        for i in range(lanes):
            if not i & distance:
                pair = [vectors[i], vectors[i + distance]]
                vectors[i] = math.bind(tirx.Shuffle(pair, low))
                vectors[i + distance] = math.bind(tirx.Shuffle(pair, high))
        distance *= 2
    return vectors


def _ceil_div(a: loops.Extent, b: int) -> loops.Extent:
    return -(-a // b) if isinstance(a, int) else tirx.floordiv(a + (b - 1), b)
