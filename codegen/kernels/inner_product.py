"""What one step of a matrix product does with a 32-bit word of each operand: the only part that knows dtypes and ISAs.

Both operands are read as words that hold ``factor`` neighbouring elements of k: one f32, two bf16 or four bytes (lowest
address in the lowest bits). A step broadcasts a word of the left matrix, multiplies it with a vector of words of the
right one, a column each, and adds the sums over the word's elements to a vector of 32-bit accumulators.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from tersor.codegen.kernels import bf16
from tersor.targets import Target

Function = Callable[[Expr], Expr]

WEIGHTS = {"float32": "float32", "bfloat16": "bfloat16", "uint8": "int8"}
"""Dtype of the elements of the right matrix by that of the left one."""

ACCUMULATORS = {"float32": "float32", "bfloat16": "float32", "uint8": "int32"}
"""Dtype of the sums by that of the left matrix."""


@dataclass(frozen=True)
class InnerProduct:
    """How words are multiplied on one ISA.

    left: dtype of the left matrix in memory.
    factor: elements of k in a word. accumulator: dtype of the sums. lanes: words in a vector.
    parts: the pairs of functions that take out of a vector of words, left and right, what one ``step`` can multiply.
    step: ``step(sums, left, right)`` adds the product of such vectors to a vector of accumulators.
    body: the part of a kernel that calls ``step`` goes inside ``with body()``, which brings in what it needs.
    """

    left: str
    factor: int
    accumulator: str
    lanes: int
    parts: tuple[tuple[Function, Function], ...]
    step: Callable[[Expr, Expr, Expr], Expr]
    body: Callable[[], AbstractContextManager] = nullcontext

    def matrix(self, buffer: tirx.Buffer) -> tirx.Buffer:
        """The left matrix as ``word`` reads it; call it once all arguments are declared."""
        if self.left != "bfloat16":
            return buffer
        # TVM rewrites operations on bfloat16, a mere reinterpretation included
        return T.decl_buffer(buffer.shape, "uint16", data=buffer.data)

    def word(self, matrix: tirx.Buffer, row: Expr | int, index: Expr) -> Expr:
        """Word ``index`` of a row of the left matrix [rows, k], all of it inside the row."""
        if self.factor == 1:
            return matrix[row, index]
        return T.reinterpret(matrix[row, T.ramp(index * self.factor, 1, self.factor)], dtype="int32")

    def last_word(self, matrix: tirx.Buffer, row: Expr | int, k: int) -> Expr:
        """The incomplete word at the end of a row of k elements; nothing past the row is read."""
        first, bits = k // self.factor * self.factor, 32 // self.factor
        parts = [
            tirx.shift_left(tirx.Cast("int32", matrix[row, at]), T.int32((at - first) * bits))
            for at in range(first, k)
        ]
        return sum(parts[1:], parts[0])


def inner_product(dtype: str, target: Target) -> InnerProduct:
    """The product for a left matrix of this dtype on a target.

    * "float32" times f32: one fused multiply-add.
    * "bfloat16" times bf16, sums in f32: vdpbf16ps, which treats denormals as zeros, or two f32 multiply-adds.
    * "uint8" times int8, exact sums in int32: vpdpbusd of AVX-512 VNNI or AVX-VNNI. Without them pairs of bytes are
      widened to 16 bits for vpmaddwd, as vpmaddubsw saturates: 2 * 255 * 128 does not fit its 16 bits.
    """
    factor, parts, step, body = 1, _WHOLE, _fma, nullcontext
    if dtype == "bfloat16" and "avx512_bf16" in target.features:
        factor, step, body = 2, bf16.dot, bf16.functions
    elif dtype == "bfloat16":
        factor, parts = 2, _BF16_PAIR
    elif dtype == "uint8":
        factor, step = 4, _vnni_step
        if ("vnni" if target.vector_bits == 512 else "avx_vnni") not in target.features:
            parts, step = _BYTE_PAIRS, _widened_step
    return InnerProduct(dtype, factor, ACCUMULATORS[dtype], target.lanes("float32"), parts, step, body)


def _same(words: Expr) -> Expr:
    return words


_WHOLE = ((_same, _same),)


def _fma(sums: Expr, left: Expr, right: Expr) -> Expr:
    return sums + left * right


def _low_bf16(words: Expr) -> Expr:
    lanes = words.ty.dtype.lanes
    return T.reinterpret(tirx.shift_left(words, tirx.const(16, words.ty.dtype)), dtype=f"float32x{lanes}")


def _high_bf16(words: Expr) -> Expr:
    lanes = words.ty.dtype.lanes
    return T.reinterpret(
        tirx.bitwise_and(words, tirx.const(-65536, words.ty.dtype)), dtype=f"float32x{lanes}"
    )


_BF16_PAIR = ((_low_bf16, _low_bf16), (_high_bf16, _high_bf16))
"""A bf16 number is the upper half of an f32."""


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
