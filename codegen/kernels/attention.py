"""Attention on merged heads: scores, softmax and weighted sum of a few query rows at a time, never all the scores.

Per batch element and head, K is transposed (and scaled) into vectors of keys, and V is copied so that its rows follow
each other. Then, for a tile of query rows: scores for all keys the tile may see, with the mask as the accumulators'
start; softmax of each row; product with V, divided by the row's sum. The scores of one tile stay in L1 or L2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import gcd, log
from typing import Literal

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from tersor.codegen.kernels import avx512, bf16, loops, math
from tersor.codegen.kernels.arguments import function
from tersor.codegen.kernels.base import TensorSpec
from tersor.codegen.kernels.chain import PLAIN, Chain
from tersor.codegen.kernels.evaluate import evaluate_chain
from tersor.codegen.kernels.inner_product import PIECE, inner_product, multiplies_bytes, multiplies_fp16
from tersor.codegen.kernels.quantize import operand_specs, operands, row_specs
from tersor.codegen.kernels.reduction import WIDTH, plus, reduce
from tersor.codegen.kernels.register_tile import RegisterTile
from tersor.codegen.packing import OFFSET
from tersor.codegen.tiles import PANEL_VECTORS, PARALLEL_FLOPS, most_rows
from tersor.ir.dims import Dim, Shape
from tersor.targets import Target

LOWEST = -3.4028234663852886e38
"""The lowest finite f32. No score is below it but -inf, so with it as the least maximum a masked key weighs 0."""

LOWEST_SUM = -(2.0**31)
"""As `LOWEST`, of sums of products of codes."""

ZERO_POINTS = -0x7F7F7F80
"""The zero point 128 in each byte of a word; a byte plus 128 modulo 256 is the signed byte 128 less."""

HALF_LIMIT = 65504.0
"""The largest fp16 number."""

HALF_UNIT = 16.0
"""What 1 stands for in scores that are summed in fp16: sums of q k^T * scale may come to 16 * 65504."""

CODES = 16
"""Codes in a register of NEON."""

HALF_ROWS = 12
"""Rows of a tile of fp16 products: a register of sums for each, and one of words."""


@dataclass(frozen=True)
class Attention:
    """``epilogue(softmax(q k^T * scale + mask) v)`` for every head; the softmax is computed in f32.

    q [batch, q_len, heads*head_dim], k [batch, kv_len, kv_heads*head_dim], v [batch, kv_len, kv_heads*value_dim] ->
    [batch, q_len, heads*value_dim]. Query head h reads key/value head ``h // (heads // kv_heads)``.

    packed: how the arguments lie. "": q, k, v. "qkv": one input [batch, length, (heads+kv_heads)*head_dim +
    kv_heads*value_dim] with the columns of q, k, v in this order. "kv": q, then one input with the columns of k, v.
    mask: the shape of a further input that broadcasts to [batch, heads, q_len, kv_len] (at most 4-d, each dim full
    or 1), or None. mask_dtype "bool" (true = attend) or "float32" (added to the scores).
    causal: query i sees keys j <= i + offset, where offset is kv_len - q_len for align "end" and 0 for "start".
    window: of those, query i sees only j > i + offset - window.
    softcap: scores before the mask become ``softcap * tanh(score / softcap)``, or None.
    dtype: of q, k and v. products: "bfloat16" allows the two matrix products to round their operands (q, k, v and the
    weights) to bf16, "float16" to fp16: q, with the scale in it, k and v are limited to its range (65504), and sums of
    up to `PIECE` products are fp16, which hold scores up to 16 * 65504 and any sums of values. Targets without these
    compute in f32. "uint8" rounds weights to multiples of 1/255, before they are added up too; with dtype "uint8" q, k
    and v are codes with zero point 128, and two further inputs behind them hold what makes scores of products of codes
    [heads] and values of codes of v [kv_heads], both f32 and positive. The products are then exact sums in int32 on
    x86, where head_dim is a multiple of 4, and on 64-bit ARM with dot products (of 4) or matrix products of bytes (of
    8); elsewhere codes are multiplied in f32, as exactly below 2^24.
    epilogue: a chain from the f32 result (its accumulator) and further inputs to the outputs, for example codes.
    A query that sees no key gives zeros, as torch's scaled_dot_product_attention does.

    Arguments: q, k and v as packed, the scales of codes, the mask, the epilogue's other inputs ("full" [batch, q_len,
    heads*value_dim], "column" [heads*value_dim], "row" [batch, q_len, 1], "scalar" ()); its outputs [batch, q_len,
    heads*value_dim].

    ValueError when heads are not a multiple of kv_heads, a packed or mask shape cannot be, or the epilogue does not
    start from one accumulator.
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
    dtype: Literal["float32", "bfloat16", "uint8"] = "float32"
    products: Literal["float32", "bfloat16", "float16", "uint8"] = "float32"
    epilogue: Chain = PLAIN

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
        kinds = [value.kind for value in self.epilogue.inputs]
        if kinds[:1] != ["accumulator"] or kinds.count("accumulator") > 1:
            raise ValueError(f"the epilogue of attention starts from one accumulator: {kinds}")

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
        parts += {"float32": [], "bfloat16": ["bf16"], "float16": ["fp16"], "uint8": ["u8"]}[self.products]
        parts += [self.epilogue.label()] if self.epilogue.steps else []
        return "_".join(parts)

    def inputs(self) -> tuple[TensorSpec, ...]:
        q, k, v = self.heads * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * self.value_dim
        query, key = (self.batch, self.q_len), (self.batch, self.kv_len)
        specs = {
            "": ((*query, q), (*key, k), (*key, v)),
            "qkv": ((*query, q + k + v),),
            "kv": ((*query, q), (*key, k + v)),
        }[self.packed]
        scales = ((self.heads,), (self.kv_heads,)) if self.dtype == "uint8" else ()
        mask = (TensorSpec(self.mask, self.mask_dtype),) if self.mask is not None else ()
        more = operand_specs(self.epilogue.inputs[1:], query, self.heads * self.value_dim)
        read = (*(TensorSpec(s, self.dtype) for s in specs), *(TensorSpec(s, "float32") for s in scales))
        return (*read, *mask, *more)

    def outputs(self) -> tuple[TensorSpec, ...]:
        return row_specs(self.epilogue, (self.batch, self.q_len), self.heads * self.value_dim)

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
        self.spec, self.target = attention, target
        self.coded = attention.dtype == "uint8"
        self.half = attention.products == "float16" and multiplies_fp16(target)
        self.narrow = attention.products == "bfloat16" and "avx512_bf16" in target.features
        self.integers = self.coded and _multiplies_codes(attention.head_dim, target)
        multiplied = (
            "uint8" if self.integers else "bfloat16" if self.narrow else "float16" if self.half else "float32"
        )
        # x86 multiplies unsigned codes by signed ones, ARM what has equal signs
        self.alike = self.integers and "neon" in target.features
        self.product = inner_product("int8" if self.alike else multiplied, target)
        self.weighting = inner_product("uint8", target, "uint8") if self.alike else self.product
        self.word = (
            multiplied if multiplied in ("float32", "float16") else f"int{max(8 * self.product.factor, 32)}"
        )
        self.stored = multiplied == attention.dtype != "float32"  # the operands hold words already
        # scores stay sums of products of codes until they are weighed
        self.sums = self.coded and attention.mask is None and attention.softcap is None
        self.exp = avx512.exp_nonpositive if avx512.speaks(target) else math.exp_nonpositive
        # loops in assembly read one stream, of two vectors of sums each, where a block is as wide
        self.streams = self.product.assembly is not None
        self.units = PANEL_VECTORS if self.streams else 1
        self.lanes = self.product.lanes * self.units
        self.panel = PANEL_VECTORS // self.units
        self.depth = -(-attention.head_dim // self.product.factor)
        self.rows = HALF_ROWS if self.half else min(8, most_rows(target))
        self.together = self.product.block[0]  # rows of a left operand whose words alternate
        self.ramp = T.ramp(0, 1, self.lanes)
        self._codes = gcd(attention.head_dim, CODES)
        self.value_vectors = -(-attention.value_dim // self.lanes)
        batch = attention.batch if isinstance(attention.batch, int) else 1
        self.parts = _parts(batch * attention.heads, target.cores or 4)

    def function(self) -> tirx.PrimFunc:
        spec = self.spec
        with function(spec.name()) as (builder, arguments):
            inputs = [arguments.declare(f"in_{i}", s) for i, s in enumerate(spec.inputs())]
            outputs = [arguments.declare(f"out_{i}", s) for i, s in enumerate(spec.outputs())]
            self.batch, self.q_len, self.kv_len = arguments.extents((spec.batch, spec.q_len, spec.kv_len))
            inputs, self.outputs = [loops.flat(b) for b in inputs], [loops.flat(b) for b in outputs]
            if self.stored:
                inputs = [_bits(b) for b in inputs]
            count = len(spec.epilogue.inputs) - 1
            inputs, self.others = inputs[: len(inputs) - count], inputs[len(inputs) - count :]
            self.mask = inputs.pop() if spec.mask is not None else None
            self.scales = [inputs.pop(), inputs.pop()][::-1] if self.coded else None
            self.q, self.k, self.v = self._operands(inputs)
            self.offset = self.kv_len - self.q_len if spec.align == "end" else 0
            self.blocks = _ceil_div(self.kv_len, self.lanes)
            work = self.batch * self.q_len * self.kv_len * (spec.heads * (spec.head_dim + spec.value_dim))
            with self.product.body():
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
        self.keys = T.alloc_buffer((self.blocks, self.depth, self.lanes), self.word)
        words = _ceil_div(self.kv_len, self.product.factor)
        shape = (words, self.value_vectors * self.lanes)
        if self.streams:  # one for each vector of columns, of whole blocks of keys
            shape = (self.value_vectors, self.blocks * (self.lanes // self.product.factor), self.lanes)
        self.values = T.alloc_buffer(shape, self.word)
        self.scores = T.alloc_buffer((self.rows, self.blocks * self.lanes))
        self.weights = self.scores
        if self.word != "float32":
            self.weights = self._left_operand(self.blocks * self.lanes // self.product.factor)
        if self.integers and not self.alike:
            self.starts = T.alloc_buffer((self.blocks, self.lanes), "int32")
        self.factor, self.value_scale = self._factors(head, group)
        self.queries = None
        if self.word != "float32" or spec.dtype != "float32":
            self.queries = self._left_operand(_ceil_div(self.depth, self.lanes) * self.lanes)
        self.maxima = T.alloc_buffer((self.rows, self.lanes))
        if self.alike:
            self.corrections = T.alloc_buffer((self.rows,), "int32")
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

    def _left_operand(self, words: loops.Extent) -> tirx.Buffer:
        """Room for so many words of each of the tile's rows, as `_store_left` lays them."""
        return T.alloc_buffer((self.rows // self.together, words * self.together), self.word)

    def _store_left(self, to: tirx.Buffer, row: Expr | int, word: Expr | int, words: Expr) -> None:
        """Words of a row from ``word`` on; those of the rows that are multiplied together alternate."""
        together, count = self.together, math.lanes_of(words)
        if together == 1:
            T.buffer_store(to, words, [row, _run(word, count)])
            return
        for i in range(count):
            value = tirx.Shuffle([words], [i]) if count > 1 else words
            T.buffer_store(to, value, [row // together, (word + i) * together + row % together])

    def _factors(self, head: Expr, group: Expr) -> tuple[Expr | float, Expr | float]:
        """What makes a score of a product of q and k, before softcap and mask; and results of values."""
        spec = self.spec
        factor: Expr | float = spec.scale if spec.softcap is None else spec.scale / spec.softcap
        if not self.coded:
            return factor, 1.0
        score, value = self.scales
        return math.bind(score[head] * factor), math.bind(value[group])

    def _numbers(self, elements: Expr) -> Expr:
        """What a vector of elements of q, k or v holds, in f32; of codes how far they are from the zero point."""
        numbers = math.cast(elements, "float32")
        return numbers - 128.0 if self.coded else numbers

    def _stored_words(self, source: _Rows, row: Expr, column: Expr, left: int) -> Expr:
        """A vector of words of an operand that holds them, from a column on; zeros behind ``left`` elements."""
        count = self.lanes * self.product.factor
        where = None if left >= count else loops.mask(left, count)
        elements = loops.load(source.buffer, row * source.stride + (source.column + column), count, where)
        return T.reinterpret(elements, dtype=f"int32x{self.lanes}")

    def _signed_words(self, source: _Rows, row: Expr, column: Expr) -> Expr:
        """As many codes as fill a register of NEON, or fewer that divide a head, as words of signed bytes."""
        count = self._codes
        codes = loops.load(source.buffer, row * source.stride + (source.column + column), count)
        codes = tirx.bitwise_xor(codes, tirx.const(OFFSET, codes.ty.dtype))
        words = count // self.product.factor
        return math.bind(T.reinterpret(codes, dtype=self.word if words == 1 else f"{self.word}x{words}"))

    def _copy_row(self, source: _Rows, row: Expr, column: Expr, to: tirx.Buffer, index: Expr | int) -> None:
        """``head_dim`` elements of an operand as words, padded with zeros to whole vectors."""
        size, lanes = self.spec.head_dim, self.lanes
        if self.alike:
            for done in range(0, size, self._codes):
                words = self._signed_words(source, row, column + done)
                self._store_left(to, index, done // self.product.factor, words)
            return
        if self.stored:
            for i in range(_ceil_div(self.depth, lanes)):
                done = i * lanes * self.product.factor
                vector = self._stored_words(source, row, column + done, size - done)
                T.buffer_store(to, vector, [index, T.ramp(i * lanes, 1, lanes)])
            return
        for i in range(-(-size // lanes)):
            where = None if size - i * lanes >= lanes else loops.mask(size - i * lanes, lanes)
            at = row * source.stride + (source.column + column + i * lanes)
            vector = self._numbers(loops.load(source.buffer, at, lanes, where))
            count = lanes // self.product.factor
            vector = bf16.words(vector) if self.narrow else vector
            if self.half:
                vector = _halves(vector * (self.factor / HALF_UNIT), HALF_LIMIT / HALF_UNIT)
            T.buffer_store(to, vector, [index, T.ramp(i * count, 1, count)])

    def _pack_keys(self, batch: Expr, group: Expr) -> None:
        """keys[block, d, lane] = word d of key block*lanes + lane, f32 ones scaled; the last key is repeated."""
        spec, lanes = self.spec, self.lanes
        if self.alike:
            self._pack_codes(batch, group)
            return
        whole, rest = divmod(self.depth, lanes)
        rows = None
        if self.narrow and not self.stored:
            rows = T.alloc_buffer((lanes, _ceil_div(self.depth, lanes) * lanes), self.word)

        def square(block: Expr, d: loops.Extent, count: int) -> None:
            where = None if count == lanes else loops.mask(count, lanes)
            vectors = []
            for i in range(lanes):
                if rows is not None:
                    vectors.append(math.bind(rows[i, T.ramp(d, 1, lanes)]))
                    continue
                row = batch * self.kv_len + tirx.min(block * lanes + i, self.kv_len - 1)
                if self.stored:
                    factor = self.product.factor
                    left = spec.head_dim % (lanes * factor) if count < lanes else lanes * factor
                    words = self._stored_words(self.k, row, group * spec.head_dim + d * factor, left)
                    vectors.append(math.bind(self._signed(words) if self.integers else words))
                    continue
                at = row * self.k.stride + (self.k.column + group * spec.head_dim + d)
                vector = self._numbers(loops.load(self.k.buffer, at, lanes, where))
                if self.half:
                    vector = _halves(vector)
                elif not self.coded:
                    vector = vector * self.factor
                vectors.append(math.bind(vector))
            for i, vector in enumerate(_transpose(vectors)[:count]):
                T.buffer_store(self.keys, vector, [block, d + i, self.ramp])

        with T.serial(self.blocks) as block:
            if rows is not None:
                with T.serial(lanes) as i:
                    key = tirx.min(block * lanes + i, self.kv_len - 1)
                    self._copy_row(self.k, batch * self.kv_len + key, group * spec.head_dim, rows, i)
            if whole:
                with T.serial(whole) as i:
                    square(block, i * lanes, lanes)
            if rest:
                square(block, whole * lanes, rest)
            if self.integers:
                self._start_sums(block)

    def _pack_codes(self, batch: Expr, group: Expr) -> None:
        """The keys, signed: squares of words, as many as a register holds."""
        spec, size = self.spec, self._codes // self.product.factor
        with T.serial(self.blocks) as block:
            with T.serial(self.lanes // size) as part, T.serial(self.depth // size) as i:
                vectors = []
                for j in range(size):
                    key = tirx.min(block * self.lanes + part * size + j, self.kv_len - 1)
                    column = group * spec.head_dim + i * self._codes
                    vectors.append(self._signed_words(self.k, batch * self.kv_len + key, column))
                for j, vector in enumerate(_transpose(vectors)):
                    T.buffer_store(self.keys, vector, [block, i * size + j, _run(part * size, size)])

    def _start_sums(self, block: Expr) -> None:
        """What sums of products with unsigned codes start from: -128 times the sum of each key."""
        zero_points = tirx.const(ZERO_POINTS, "int32")
        sums = RegisterTile(1, 1, self.product)
        sums.accumulate(0, self.depth, lambda *_: zero_points, lambda _, d: self.keys[block, d, self.ramp])
        T.buffer_store(self.starts, sums.vector(0, 0) * -1, [block, self.ramp])

    def _signed(self, words: Expr) -> Expr:
        """Unsigned bytes with the zero point 128 as signed ones."""
        return tirx.bitwise_xor(words, tirx.const(ZERO_POINTS, words.ty.dtype))

    def _pack_values(self, batch: Expr, group: Expr) -> None:
        """values[j] = the rows of v, one to eight, that word j of the weights meets; the last row may be repeated.

        Streams have zeros behind the last row, up to the end of its block."""
        spec, lanes, factor = self.spec, self.lanes, self.product.factor
        with T.serial(_ceil_div(self.kv_len, factor)) as j:
            for i in range(self.value_vectors):
                left = spec.value_dim - i * lanes
                where = None if left >= lanes else loops.mask(left, lanes)
                vectors = []
                for part in range(factor):
                    row = batch * self.kv_len + (
                        tirx.min(j * factor + part, self.kv_len - 1) if part else j * factor
                    )
                    at = row * self.v.stride + (self.v.column + group * spec.value_dim + i * lanes)
                    vectors.append(loops.load(self.v.buffer, at, lanes, where))
                if self.alike:
                    vector = T.reinterpret(_woven(vectors), dtype=f"{self.word}x{lanes}")
                elif self.stored:
                    vector = _interleaved([tirx.Cast(f"int32x{lanes}", vector) for vector in vectors])
                    vector = self._signed(vector) if self.integers else vector
                else:
                    vectors = [self._numbers(vector) for vector in vectors]
                    vector = bf16.pairs(*vectors) if self.narrow else vectors[0]
                if self.streams:
                    vector = _halves(vector) if self.half else vector
                    T.buffer_store(self.values, vector, [i, j, self.ramp])
                else:
                    T.buffer_store(self.values, vector, [j, T.ramp(i * lanes, 1, lanes)])
        if not self.streams:
            return
        filled = _ceil_div(self.kv_len, factor)
        with T.serial(self.blocks * (lanes // factor) - filled) as j:
            zeros = tirx.const(0, f"{self.word}x{lanes}")
            for i in range(self.value_vectors):
                T.buffer_store(self.values, zeros, [i, filled + j, self.ramp])

    def _key_bias(self, batch: Expr, head: Expr) -> tirx.Buffer | None:
        """What is added to the scores of every query alike: the mask where it has no query dimension, -inf past the
        last key. None where that is nothing or where every query has its own."""
        spec, lanes = self.spec, self.lanes
        own_rows = spec.mask is not None and spec.full_mask[2] != 1
        if (
            self.sums
            or own_rows
            or (spec.mask is None and isinstance(self.kv_len, int) and self.kv_len % lanes == 0)
        ):
            return None
        bias = T.alloc_buffer((self.blocks * lanes,))
        with T.serial(self.blocks) as block:
            vector = self._mask_vector(batch, head, 0, block * lanes, lanes)
            T.buffer_store(bias, vector, [T.ramp(block * lanes, 1, lanes)])
        return bias

    def _mask_vector(self, batch: Expr, head: Expr, query: Expr | int, key: Expr, lanes: int) -> Expr:
        """The mask of one query for some keys from ``key`` on as a number to add; -inf past the last key."""
        spec = self.spec
        inside = loops.mask(self.kv_len - key, lanes)
        zero, minus_infinity = (tirx.const(c, f"float32x{lanes}") for c in (0.0, float("-inf")))
        if spec.mask is None:
            return tirx.Select(inside, zero, minus_infinity)
        position = (batch, head, query, key)
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
            begin = math.bind(tirx.min(tirx.max(lowest, 0), end) // WIDTH * WIDTH)
        blocks = math.bind(_ceil_div(end, lanes))
        first_block = math.bind(begin // lanes)
        for r in range(rows):
            lowest = tirx.const(LOWEST_SUM if self.sums else LOWEST, f"float32x{lanes}")
            T.buffer_store(self.maxima, lowest, [r, self.ramp])
        # blocks that every row sees whole need no comparison with the diagonal
        if spec.window is not None:
            free = first_block
        elif spec.causal:
            free = math.bind(tirx.max(tirx.min(first + (self.offset + 1), self.kv_len) // lanes, 0))
        else:
            free = blocks
        if self.queries is not None:
            for r, query in enumerate(queries):
                self._copy_row(self.q, batch * self.q_len + query, head * spec.head_dim, self.queries, r)
        self._score_blocks(batch, head, queries, first_block, free, diagonal=False)
        if spec.causal or spec.window is not None:
            self._score_blocks(batch, head, queries, free, blocks, diagonal=True)
        self._softmax(rows, first_block, blocks)
        self._weighted_sum(batch, head, queries, begin, end)

    def _score_blocks(self, batch, head, queries: list[Expr], begin, end, diagonal: bool) -> None:
        """Scores for the blocks begin..end-1 of keys, several at a time."""
        count = end - begin
        if isinstance(count, int):
            pairs, odd = divmod(count, self.panel)
            if pairs:
                with T.serial(pairs) as pair:
                    self._scores(batch, head, queries, begin + pair * self.panel, self.panel, diagonal)
            if odd:
                self._scores(batch, head, queries, begin + pairs * self.panel, odd, diagonal)
            return
        with T.serial(tirx.max(count, 0) // self.panel) as pair:
            self._scores(batch, head, queries, begin + pair * self.panel, self.panel, diagonal)
        if self.panel == 1:
            return
        with T.If(tirx.And(count > 0, tirx.floormod(count, self.panel) == 1)):
            with T.Then():
                self._scores(batch, head, queries, end - 1, 1, diagonal)

    def _scores(self, batch, head, queries: list[Expr], block: Expr, vectors: int, diagonal: bool) -> None:
        """The scores of the tile's rows for a few blocks of keys, into ``scores``; raises the rows' maxima."""
        spec, lanes = self.spec, self.lanes
        first = block * lanes

        def mask(r: int, n: int, lanes: int) -> Expr:
            """Of vector n of so many lanes."""
            if self.bias is not None:
                return self.bias[T.ramp(first + n * lanes, 1, lanes)]
            if spec.mask is None:
                return tirx.const(0.0, f"float32x{lanes}")
            return self._mask_vector(batch, head, queries[r], first + n * lanes, lanes)

        unit = HALF_UNIT if self.half else self.factor
        scaled = self.half or self.coded and not self.sums or self.narrow and self.factor != 1.0
        # what the mask is added to is not the product itself
        later = scaled or self.half or spec.softcap is not None
        start = None
        if self.integers and not self.alike:
            start = lambda _, n: self.starts[block + n, self.ramp]  # noqa: E731
        elif not later and not self.sums:
            start = lambda r, n: mask(r, n, self.product.lanes)  # noqa: E731
        sums = RegisterTile(len(queries), vectors * self.units, self.product, start)
        rows = [
            math.bind((batch * self.q_len + q) * self.q.stride + (self.q.column + head * spec.head_dim))
            for q in queries
        ]

        def query_words(r: int, d: Expr, count: int) -> Expr:
            if self.queries is None:
                return self.q.buffer[_run(rows[r] + d, count)]
            return self.queries[r, _run(d * self.together, count)]

        if self.streams:
            self._stream(sums, query_words, 0, self.depth, lambda d: self.keys[block, d, 0])
        else:
            sums.accumulate(0, self.depth, query_words, lambda n, d: self.keys[block + n, d, self.ramp])
        for r, query in enumerate(queries):
            highest = self.maxima[r, self.ramp]
            for n in range(vectors):
                score = self._result(sums, r, n)
                if scaled:
                    score = score * unit
                if spec.softcap is not None:
                    score = math.tanh(score) * spec.softcap
                if later:
                    score = score + mask(r, n, lanes)
                score = math.bind(score)
                if diagonal:
                    score = math.bind(self._see(score, query, block + n))
                T.buffer_store(self.scores, score, [r, T.ramp((block + n) * lanes, 1, lanes)])
                highest = tirx.max(score, highest)
            T.buffer_store(self.maxima, highest, [r, self.ramp])

    def _stream(
        self,
        sums: RegisterTile,
        left: Callable[[int, Expr, int], Expr],
        first: Expr | int,
        count: loops.Extent,
        right: Callable[[Expr], Expr],
    ) -> None:
        """Adds products of words ``first`` to ``first + count - 1``, fp16 ones in pieces.

        ``left`` as `RegisterTile` has it, ``right(k)`` is the number that word k of the right vectors begins with. A
        count that is no constant is one of whole blocks."""

        def run(start: Expr, words: loops.Extent) -> None:
            sums.stream(words, lambda r: T.address_of(left(r, start, 1)), T.address_of(right(start)))

        assembly = self.product.assembly
        piece = assembly.piece
        done, rest = first, count
        if piece:
            whole, rest = count // piece, count % piece
            with T.serial(whole) as i:
                run(first + i * piece, piece)
            done = first + whole * piece
        if isinstance(rest, int):
            if rest:
                run(done, rest)
            return
        step, size = assembly.step, assembly.step
        with T.If(rest >= step):
            with T.Then():
                run(done, rest // step * step)
        while size > self.lanes // self.product.factor:
            size //= 2
            with T.If(rest % (2 * size) >= size):
                with T.Then():
                    run(done + rest // (2 * size) * (2 * size), size)

    def _result(self, sums: RegisterTile, r: int, n: int, correction: Expr | None = None) -> Expr:
        """Vector n of row r of the sums, as wide as a block, in f32; with what all of the row's sums lack."""
        parts = [sums.vector(r, n * self.units + i) for i in range(self.units)]
        vector = tirx.Shuffle(parts, list(range(self.lanes))) if len(parts) > 1 else parts[0]
        if correction is not None:  # unsigned: the sum alone may pass 2^31
            wrapped, correction = (
                T.reinterpret(x, dtype=f"uint32x{self.lanes}") for x in (vector, correction)
            )
            vector = T.reinterpret(wrapped + correction, dtype=f"int32x{self.lanes}")
        return math.cast(vector, "float32")

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
        """The weights exp(score - maximum), f32 ones in place of the scores, and what makes results of each row's sums
        of products, its inverse sum but for the scale of the values: 0 where no key is seen."""
        lanes = self.lanes
        with T.serial(rows) as r:
            if self.sums:
                self._hide_repeated(r)
            highest = math.horizontal(tirx.max, self.maxima[r, self.ramp])
            # added, as an addition to a product is fused with it on every instruction set, and a subtraction is not
            shift = highest * (self.factor * -1.0 if self.sums else -1.0)
            if self.half:  # weights come to at most half of 1 / PIECE: the sum of a piece cannot overflow
                shift = shift - log(2 * PIECE)
            shift = math.bind(math.broadcast(shift, lanes))

            def weight(offset: loops.Extent, where: None) -> Expr:
                at = begin * lanes + offset
                score = self.scores[r, T.ramp(at, 1, lanes)]
                score = score * self.factor if self.sums else score
                value = math.bind(self.exp(score + shift))
                if self.spec.products == "uint8":
                    value = math.bind(self._weight_code(value))
                words = value
                if self.integers:
                    words = _bytes(value, self.word)
                elif self.narrow:
                    words = bf16.words(value)
                words = math.cast(words, "float16") if self.half else words
                self._store_left(self.weights, r, at // self.product.factor, words)
                return value

            zero = tirx.const(0, "int32" if self.integers else "float32")
            total = math.bind(reduce(end - begin, 0, lanes, weight, plus, zero))
            if self.alike:
                T.buffer_store(self.corrections, total * -OFFSET, [r])
            total = math.bind(math.cast(total, "float32"))
            inverse = tirx.Select(total > 0.0, self.value_scale / total, tirx.const(0.0, "float32"))
            T.buffer_store(self.inverses, inverse, [r])

    def _weight_code(self, weight: Expr) -> Expr:
        """round(255 weight), half to even, in the type of the sums."""
        shifted = math.bind(weight * 255.0 + math.ROUND)
        if not self.integers:
            return shifted - math.ROUND
        bits = tirx.reinterpret(f"int32x{self.lanes}", shifted)
        return tirx.bitwise_and(bits, tirx.const(255, bits.ty.dtype))

    def _hide_repeated(self, r: Expr) -> None:
        """-inf for what lies past the last key in a row of scores; that is the last key's score again."""
        if isinstance(self.kv_len, int) and self.kv_len % self.lanes == 0:
            return
        last = self.blocks - 1
        at = [r, T.ramp(last * self.lanes, 1, self.lanes)]
        hidden = tirx.const(float("-inf"), f"float32x{self.lanes}")
        inside = loops.mask(self.kv_len - last * self.lanes, self.lanes)
        T.buffer_store(self.scores, tirx.Select(inside, self.scores[tuple(at)], hidden), at)

    def _weighted_sum(self, batch, head, queries: list[Expr], begin, end) -> None:
        """out = weights @ values * inverse sum."""
        if self.streams:
            whole, rest = divmod(self.spec.value_dim, self.lanes)
            if whole:
                with T.serial(whole) as i:  # the assembly stands there once
                    self._weighted_vectors(batch, head, queries, begin, end, i, 1)
            if rest:
                self._weighted_vectors(batch, head, queries, begin, end, whole, 1)
            return
        for first in range(0, self.value_vectors, self.panel):
            width = min(self.panel, self.value_vectors - first)
            self._weighted_vectors(batch, head, queries, begin, end, first, width)

    def _weighted_vectors(
        self, batch, head, queries: list[Expr], begin, end, first: Expr | int, width: int
    ) -> None:
        """Some vectors of columns of the weighted sum."""
        spec, lanes, factor = self.spec, self.lanes, self.product.factor
        sums = RegisterTile(len(queries), width * self.units, self.weighting)

        def weights(r: int, j: Expr, count: int) -> Expr:
            return self.weights[r, _run(j * self.together, count)]

        if self.streams:
            count = end - begin
            if isinstance(count, int):
                count = _ceil_div(count, factor)
            else:
                count = _ceil_div(count, lanes) * (lanes // factor)
            self._stream(sums, weights, begin // factor, count, lambda j: self.values[first, j, 0])
        else:
            sums.accumulate(
                begin // factor,
                _ceil_div(end, factor) - begin // factor,
                weights,
                lambda n, j: self.values[j, T.ramp((first + n) * lanes, 1, lanes)],
            )
        size = spec.heads * spec.value_dim
        for r, query in enumerate(queries):
            correction = tirx.Broadcast(self.corrections[r], lanes) if self.alike else None
            inverse, row = tirx.Broadcast(self.inverses[r], lanes), batch * self.q_len + query
            for n in range(width):
                column = (first + n) * lanes
                left = spec.value_dim - column if isinstance(first, int) else lanes
                where = None if left >= lanes else loops.mask(left, lanes)
                offset = head * spec.value_dim + column
                values = operands(spec.epilogue.inputs[1:], self.others, row, size, offset, lanes, where)
                result = self._result(sums, r, n, correction) * inverse
                results = evaluate_chain(spec.epilogue, [result, *values], self.target)
                for buffer, result in zip(self.outputs, results, strict=True):
                    loops.store(buffer, row * size + offset, math.cast(result, buffer.dtype), lanes, where)


def _multiplies_codes(head_dim: int, target: Target) -> bool:
    """Whether codes are multiplied as the integers they are: where that is faster than in f32, and heads end with
    words."""
    fast = "neon" not in target.features or multiplies_bytes(target)
    return fast and head_dim % inner_product("uint8", target).factor == 0


def _parts(tasks: int, threads: int) -> int:
    """Into how many parts to cut each of some equal tasks, so that no thread waits long for another."""
    return next(p for p in (1, 2, 4) if tasks * p % threads == 0 or tasks * p >= 4 * threads or p == 4)


def _interleaved(parts: list[Expr]) -> Expr:
    """Vectors of int32 that hold 32 / n bits each as the words made of all n, the first in the lowest bits."""
    bits = 32 // len(parts)
    words = parts[0]
    for i, part in enumerate(parts[1:], 1):
        words = tirx.bitwise_or(words, tirx.shift_left(part, tirx.const(i * bits, part.ty.dtype)))
    return words


def _woven(rows: list[Expr]) -> Expr:
    """Vectors of unsigned numbers as one of wider numbers, each made of a lane of all, the first in the lowest bits."""
    while len(rows) > 1:
        lanes, bits = math.lanes_of(rows[0]), rows[0].ty.dtype.bits
        order = [i + lanes * part for i in range(lanes) for part in range(2)]
        pairs = zip(rows[::2], rows[1::2], strict=True)
        rows = [T.reinterpret(tirx.Shuffle(list(p), order), dtype=f"uint{2 * bits}x{lanes}") for p in pairs]
    return rows[0]


def _halves(numbers: Expr, most: float = HALF_LIMIT) -> Expr:
    """f32 numbers in fp16, those beyond ``most`` limited to it."""
    limit = tirx.const(most, numbers.ty.dtype)
    return math.cast(tirx.max(tirx.min(numbers, limit), -limit), "float16")


def _bytes(codes: Expr, word: str) -> Expr:
    """Numbers from 0 to 255, int32, as words of some neighbours."""
    lanes = math.lanes_of(codes)
    count = 8 * lanes // int(word.removeprefix("int"))
    return T.reinterpret(tirx.Cast(f"uint8x{lanes}", codes), dtype=word if count == 1 else f"{word}x{count}")


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


def _bits(buffer: tirx.Buffer) -> tirx.Buffer:
    """The bits of a flat bf16 buffer: TVM rewrites operations on bf16, a mere reinterpretation included."""
    return T.decl_buffer(buffer.shape, "uint16", data=buffer.data) if buffer.dtype == "bfloat16" else buffer


def _run(first: Expr, count: int) -> Expr:
    """Indices of neighbours."""
    return first if count == 1 else T.ramp(first, 1, count)


def _ceil_div(a: loops.Extent, b: int) -> loops.Extent:
    return -(-a // b) if isinstance(a, int) else tirx.floordiv(a + (b - 1), b)
