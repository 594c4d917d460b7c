"""How neighbouring elements of k are multiplied on each ISA: the only part that knows dtypes and instructions.

Both operands are read as *words* that hold ``factor`` neighbouring elements of k, lowest address in the lowest bits. A
step multiplies some words of the left matrix with a vector of words of the right one and adds the products, summed
over each word's elements, to a vector of accumulators, 32 bits each. How many results an accumulator belongs to, and
which, differs:

* AVX, and NEON with products by lane (``fmla v, v, v.s[i]``, ``sdot``): one row, a column in every lane. The
  left word is repeated in all lanes. NEON takes it from a vector of four words of a row, which is loaded once for them.
* NEON with fp16 arithmetic (``fmla v.8h, v.8h, v.h[i]``): the same, in pieces of k whose sums are fp16 numbers, eight
  to a vector; behind each piece they are added to accumulators in f32.
* NEON with matrix products (``usmmla``, ``bfmmla``): two rows by two columns. The rows come in pairs.
* NEON without products of bytes: one row and column, its lanes are partial sums.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from tersor.codegen.kernels import bf16, neon
from tersor.codegen.kernels.assembly import MultiplyAdd
from tersor.codegen.packing import ELEMENTS, Words
from tersor.targets import Target

Function = Callable[[Expr], Expr]

WEIGHTS = {
    "float32": "float32",
    "float16": "float16",
    "bfloat16": "bfloat16",
    "uint8": "int8",
    "int8": "int8",
}
"""Dtype of the elements of the right matrix by that of the left one; float32 also multiplies float16, uint8 uint8."""

ACCUMULATORS = {
    "float32": "float32",
    "float16": "float32",
    "bfloat16": "float32",
    "uint8": "int32",
    "int8": "int32",
}
"""Dtype of the sums by that of the left matrix."""


@dataclass(frozen=True)
class InnerProduct:
    """How words are multiplied on one ISA.

    left: dtype of the left matrix in memory.
    words: how the right matrix is packed. accumulator: dtype of the sums. lanes: accumulators in a vector.
    parts: the pairs of functions that take out of a vector of words, left and right, what one ``step`` can multiply.
    step: ``step(sums, left, right)`` adds the product of such vectors to a vector of accumulators.
    body: the part of a kernel that calls ``step`` goes inside ``with body()``, which brings in what it needs.
    group: neighbouring words of a row that are loaded as one vector, to be used one after the other.
    block: rows and columns of the results that one vector of accumulators belongs to.
    row: ``row(vectors, i)`` makes a vector of results, row i of a block, from the accumulators that hold it.
    assembly: the instruction that ``step`` is, where loops over rows in memory are written in assembly (64-bit ARM);
    for fp16 there is no other way.
    """

    left: str
    words: Words
    accumulator: str
    lanes: int
    parts: tuple[tuple[Function, Function], ...]
    step: Callable[[Expr, Expr, Expr], Expr]
    body: Callable[[], AbstractContextManager]
    group: int
    block: tuple[int, int]
    row: Callable[[Sequence[Expr], int], Expr]
    assembly: MultiplyAdd | None = None

    @property
    def factor(self) -> int:
        """Elements of k in a word."""
        return self.words.elements

    @property
    def per_vector(self) -> int:
        """Vectors of accumulators that hold the ``lanes`` results of a row."""
        return self.lanes // self.block[1]

    @property
    def pairs(self) -> bool:
        """Whether the left matrix comes in pairs of rows, as `Prepare` writes it."""
        return self.block[0] == 2

    @property
    def loads(self) -> bool:
        """Whether the left operand of a step comes from a vector register rather than from memory."""
        return self.group > 1 or self.block[1] < self.lanes

    def matrix(self, buffer: tirx.Buffer) -> tirx.Buffer:
        """The left matrix as ``word`` reads it; call it once all arguments are declared."""
        rows, k = buffer.shape
        # TVM rewrites operations on bfloat16, a mere reinterpretation included
        dtype = "uint16" if self.left == "bfloat16" else buffer.dtype
        if self.pairs:
            return T.decl_buffer((rows, 2 * k), dtype, data=buffer.data)
        return buffer if dtype == buffer.dtype else T.decl_buffer((rows, k), dtype, data=buffer.data)

    def word(self, matrix: tirx.Buffer, row: Expr | int, index: Expr, count: int = 1) -> Expr:
        """``count`` words of a row, or pair of rows, of the left matrix from word ``index`` on, all of them in it."""
        if self.factor == 1:
            return matrix[row, index if count == 1 else T.ramp(index, 1, count)]
        size = self.factor * self.block[0]
        elements = matrix[row, T.ramp(index * size, 1, count * size)]
        return self._words(elements)

    def address(self, matrix: tirx.Buffer, row: Expr | int, index: Expr | int) -> Expr:
        """Where word ``index`` of a row, or pair of rows, of the left matrix lies."""
        return T.address_of(matrix[row, index * (self.factor * self.block[0])])

    def last_word(self, matrix: tirx.Buffer, row: Expr | int, k: int) -> Expr:
        """The incomplete word at the end of a row of k elements; nothing past the row is read."""
        first = k // self.factor * self.factor
        bits = 32 // self.factor
        parts = [
            tirx.shift_left(tirx.Cast("int32", matrix[row, at]), T.int32((at - first) * bits))
            for at in range(first, k)
        ]
        return sum(parts[1:], parts[0])

    def _words(self, elements: Expr) -> Expr:
        """A vector of elements as int32 numbers."""
        lanes = elements.ty.dtype.bits * elements.ty.dtype.lanes // 32
        return T.reinterpret(elements, dtype="int32" if lanes == 1 else f"int32x{lanes}")

    def spread(self, words: Expr, index: int) -> Expr:
        """Word ``index`` of a vector of them, or the only one, as the left operand of a step."""
        lanes = words.ty.dtype.lanes
        if self.block[1] < self.lanes:
            return words
        return T.broadcast(words, self.lanes) if lanes == 1 else tirx.Shuffle([words], [index] * self.lanes)


def multiplies_fp16(target: Target) -> bool:
    """Whether a target multiplies fp16 numbers faster than f32."""
    return target.arch == "aarch64" and "fp16" in target.features


def multiplies_bytes(target: Target) -> bool:
    """Whether a target multiplies bytes of equal signs, and adds them up, faster than f32."""
    return target.arch == "aarch64" and not target.features.isdisjoint(("dotprod", "i8mm"))


def inner_product(dtype: str, target: Target, weight: str | None = None) -> InnerProduct:
    """The product for a left matrix of this dtype on a target; ``weight`` is the right one's if not `WEIGHTS`.

    * "float32" times f32: one fused multiply-add.
    * "float32" times fp16: the same, the right operand widened.
    * "float16" times fp16, on targets that multiply them (`multiplies_fp16`): sums of `PIECE` products are fp16.
    * "bfloat16" times bf16, sums in f32: vdpbf16ps or bfmmla, which take denormals for zeros, or two f32 products.
    * "uint8" times int8, exact sums in int32. x86: vpdpbusd of AVX-512 VNNI or AVX-VNNI. Without them pairs of bytes
      are widened to 16 bits for vpmaddwd, as vpmaddubsw saturates: 2 * 255 * 128 does not fit its 16 bits. NEON:
      usmmla, sdot or widening products; the last two multiply signed bytes, codes less 128 (`Prepare`, `Words.signed`).
    * "int8" times int8 and "uint8" times uint8, on NEON with dot or matrix products: sdot or smmla, udot or ummla.

    ValueError when the target does not multiply fp16 numbers, or bytes of equal signs.
    """
    if dtype == "float16" and not multiplies_fp16(target):
        raise ValueError(
            f"{target.name} has no products of fp16 numbers: multiply float32 by float16 instead"
        )
    weight = weight or WEIGHTS[dtype]
    if dtype == weight and dtype in ("int8", "uint8") and not multiplies_bytes(target):
        raise ValueError(f"{target.name} has no products of {dtype} by {weight}")
    if "neon" in target.features:
        return _neon(dtype, target, weight)
    words, parts, step, body = WORDS[dtype], _WHOLE, _fma, nullcontext
    if weight == "float16":
        parts = _WIDENED
    elif dtype == "bfloat16" and "avx512_bf16" in target.features:
        step, body = bf16.dot, bf16.functions
    elif dtype == "bfloat16":
        parts = _BF16_PAIR
    elif dtype == "uint8":
        step = _vnni_step
        if ("vnni" if target.vector_bits == 512 else "avx_vnni") not in target.features:
            parts, step = _BYTE_PAIRS, _widened_step
    lanes = target.lanes("float32")
    return InnerProduct(dtype, words, ACCUMULATORS[dtype], lanes, parts, step, body, 1, (1, lanes), _only)


def _neon(dtype: str, target: Target, weight: str) -> InnerProduct:
    known, lanes = target.features, target.lanes("float32")
    assembly = None
    words, parts, step, body = WORDS[dtype], _WHOLE, _fma, nullcontext
    group, block, row = lanes, (1, lanes), _only
    if dtype == "float16":
        group = 2 * lanes
        assembly = MultiplyAdd("fmla", "<8 x half>", "8h", "8h", "h", 8, "h", piece=PIECE)
    elif weight == "float16":
        parts = _WIDENED
    elif dtype == "bfloat16" and "bf16" in known:
        words, step, body = Words(4), neon.bf16_matrix_step, neon.bf16_functions
        group, block, row = 1, (2, 2), neon.matrix_row
        assembly = MultiplyAdd("bfmmla", "<4 x float>", "4s", "8h")
    elif dtype == "bfloat16":
        parts = _BF16_PAIR
    elif weight in _DOTS and "i8mm" in known:
        instruction = _MATRICES[dtype, weight]
        words, step = Words(8), neon.matrix_step(instruction)
        group, block, row = 1, (2, 2), neon.matrix_row
        # the tiles of attention, which multiplies bytes of equal signs, are low: counting would take its share
        assembly = MultiplyAdd(instruction, "<4 x i32>", "4s", "16b", long=dtype == weight)
    elif weight in _DOTS and "dotprod" in known:
        words, step = Words(4, signed=True, sums=1), neon.dot_step(_DOTS[weight])
        # GEMM, which multiplies other kinds of bytes, has better use for the registers than pairs: a higher tile
        paired = dtype == weight
        assembly = MultiplyAdd(_DOTS[weight], "<4 x i32>", "4s", "16b", "4b", lanes, "s", paired)
    elif dtype == "uint8":
        words, step, group, block = Words(16, signed=True, sums=1), neon.widened_step(target.arch), 1, (1, 1)
        row = neon.partial_sums
    elif target.arch == "aarch64" and dtype == "float32":
        assembly = MultiplyAdd("fmla", "<4 x float>", "4s", "4s", "s", lanes, "s", paired=True)
    accumulator = ACCUMULATORS[dtype]
    return InnerProduct(dtype, words, accumulator, lanes, parts, step, body, group, block, row, assembly)


_DOTS = {"int8": "sdot", "uint8": "udot"}
"""By the dtype of the right matrix; codes that meet signed bytes are signed too by then, see `Prepare`."""

_MATRICES = {("uint8", "int8"): "usmmla", ("int8", "int8"): "smmla", ("uint8", "uint8"): "ummla"}

WORDS = {dtype: Words(ELEMENTS[weight]) for dtype, weight in WEIGHTS.items()}
"""Words of 32 bits (of fp16: 16), by dtype of the left matrix."""

PIECE = 64
"""Products that are summed in fp16: the error of the sum grows with them, and so does the speed."""


def stored_words(dtype: str, target: Target, groups: int | None = None) -> Words | None:
    """How weights for a left matrix of this dtype are packed for a target; None for `WORDS`.

    ``groups``: what is multiplied is codes less 128, in so many parts (`Gemm.groups`).
    """
    words = inner_product(dtype, target).words
    if groups:
        words = replace(words, sums=0 if words.signed else groups)
    return None if words == WORDS[dtype] else words


def _same(words: Expr) -> Expr:
    return words


_WHOLE = ((_same, _same),)


def _only(vectors: Sequence[Expr], i: int) -> Expr:
    return vectors[0]


def _fma(sums: Expr, left: Expr, right: Expr) -> Expr:
    return sums + left * right


def _low_bf16(words: Expr) -> Expr:
    lanes = words.ty.dtype.lanes
    dtype = f"float32x{lanes}" if lanes > 1 else "float32"
    return T.reinterpret(tirx.shift_left(words, tirx.const(16, words.ty.dtype)), dtype=dtype)


def _high_bf16(words: Expr) -> Expr:
    lanes = words.ty.dtype.lanes
    dtype = f"float32x{lanes}" if lanes > 1 else "float32"
    return T.reinterpret(tirx.bitwise_and(words, tirx.const(-65536, words.ty.dtype)), dtype=dtype)


_BF16_PAIR = ((_low_bf16, _low_bf16), (_high_bf16, _high_bf16))
"""A bf16 number is the upper half of an f32."""


def _wide(words: Expr) -> Expr:
    lanes = words.ty.dtype.lanes
    return tirx.Cast(f"float32x{lanes}" if lanes > 1 else "float32", words)


_WIDENED = ((_same, _wide),)
"""Only the right matrix is fp16."""


def _view(words: Expr, element: str) -> Expr:
    """The same bits as a vector of elements of another integer type."""
    bits = words.ty.dtype.bits * words.ty.dtype.lanes
    return T.reinterpret(words, dtype=f"{element}x{bits // int(element.lstrip('uint'))}")


def _vnni_step(sums: Expr, left: Expr, right: Expr) -> Expr:
    name = f"llvm.x86.avx512.vpdpbusd.{32 * sums.ty.dtype.lanes}"
    return T.call_llvm_pure_intrin(sums.ty.dtype, name, sums, _view(left, "uint8"), _view(right, "int8"))


def _widened_step(sums: Expr, left: Expr, right: Expr) -> Expr:
    name = "llvm.x86.avx512.pmaddw.d.512" if sums.ty.dtype.lanes == 16 else "llvm.x86.avx2.pmadd.wd"
    return sums + T.call_llvm_pure_intrin(sums.ty.dtype, name, _view(left, "int16"), right)


def _low_signed(words: Expr) -> Expr:
    shorts = _view(words, "int16")
    eight = tirx.const(8, shorts.ty.dtype)
    return tirx.shift_right(tirx.shift_left(shorts, eight), eight)


def _high(element: str) -> Function:
    def high(words: Expr) -> Expr:
        shorts = _view(words, element)
        return tirx.shift_right(shorts, tirx.const(8, shorts.ty.dtype))

    return high


def _low_unsigned(words: Expr) -> Expr:
    return tirx.bitwise_and(words, tirx.const(0x00FF00FF, words.ty.dtype))


_BYTE_PAIRS = ((_low_unsigned, _low_signed), (_high("uint16"), _high("int16")))
"""Bytes 0 and 2 of a word, then bytes 1 and 3, as 16-bit numbers."""
