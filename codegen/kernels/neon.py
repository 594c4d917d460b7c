"""Products of NEON that TIR has no word for: int8 by dot products, matrix products or widening, bf16 by
matrix products.

Vectors of words are int32 numbers, four to a register; see `inner_product`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

BF16_FUNCTIONS = """
define <4 x float> @tersor_bfmmla(<4 x float> %sums, <4 x i32> %left, <4 x i32> %right) alwaysinline {
  %a = bitcast <4 x i32> %left to <8 x bfloat>
  %b = bitcast <4 x i32> %right to <8 x bfloat>
  %r = call <4 x float> @llvm.aarch64.neon.bfmmla(<4 x float> %sums, <8 x bfloat> %a, <8 x bfloat> %b)
  ret <4 x float> %r
}
declare <4 x float> @llvm.aarch64.neon.bfmmla(<4 x float>, <8 x bfloat>, <8 x bfloat>)
"""


def bf16_functions() -> AbstractContextManager:
    """The part of a kernel that calls ``bf16_matrix_step`` goes inside: TVM rewrites bfloat16 wherever it sees it."""
    return T.attr(T.int32(0), "pragma_import_llvm", BF16_FUNCTIONS)


def bf16_matrix_step(sums: Expr, left: Expr, right: Expr) -> Expr:
    """2x2 f32 sums plus 2x4 bf16 numbers times 4x2 of them (bfmmla)."""
    return T.call_extern("float32x4", "tersor_bfmmla", sums, left, right)


def dot_step(instruction: str) -> Callable[[Expr, Expr, Expr], Expr]:
    """4 sums plus the products of 4 bytes each (sdot, udot)."""
    element = {"sdot": "int8", "udot": "uint8"}[instruction]

    def step(sums: Expr, left: Expr, right: Expr) -> Expr:
        name = f"llvm.aarch64.neon.{instruction}"
        return T.call_llvm_pure_intrin("int32x4", name, sums, _bytes(right, element), _bytes(left, element))

    return step


def matrix_step(instruction: str) -> Callable[[Expr, Expr, Expr], Expr]:
    """2x2 sums plus 2x8 bytes times 8x2 bytes (smmla, ummla; usmmla: unsigned times signed ones)."""
    signs = {"smmla": ("int8", "int8"), "ummla": ("uint8", "uint8"), "usmmla": ("uint8", "int8")}[instruction]

    def step(sums: Expr, left: Expr, right: Expr) -> Expr:
        operands = map(_bytes, (left, right), signs)
        return T.call_llvm_pure_intrin("int32x4", f"llvm.aarch64.neon.{instruction}", sums, *operands)

    return step


def matrix_row(vectors: Sequence[Expr], i: int) -> Expr:
    """Row i of two 2x2 blocks side by side."""
    return tirx.Shuffle(list(vectors), [2 * i, 2 * i + 1, 4 + 2 * i, 5 + 2 * i])


def widened_step(arch: str) -> Callable[[Expr, Expr, Expr], Expr]:
    """4 partial sums plus the products of 16 signed bytes (smull, smull2, sadalp).

    Two products are not added in 16 bits first, as smlal2 would: twice 128 * 128 does not fit.
    """

    def step(sums: Expr, left: Expr, right: Expr) -> Expr:
        a, b = _bytes(left, "int8"), _bytes(right, "int8")
        for half in (T.vectorlow, T.vectorhigh):
            products = tirx.Cast("int16x8", half("int8x8", a)) * tirx.Cast("int16x8", half("int8x8", b))
            if arch == "aarch64":
                sums = sums + T.call_llvm_pure_intrin("int32x4", "llvm.aarch64.neon.saddlp", products)
            else:
                sums = T.call_llvm_pure_intrin("int32x4", "llvm.arm.neon.vpadals", sums, products)
        return sums

    return step


def partial_sums(vectors: Sequence[Expr], i: int) -> Expr:
    """The totals of four vectors, a lane each."""
    while len(vectors) > 1:
        pairs = zip(vectors[::2], vectors[1::2], strict=True)
        vectors = [tirx.Shuffle([a, b], [0, 2, 4, 6]) + tirx.Shuffle([a, b], [1, 3, 5, 7]) for a, b in pairs]
    return vectors[0]


def _bytes(words: Expr, element: str) -> Expr:
    return T.reinterpret(words, dtype=f"{element}x{4 * words.ty.dtype.lanes}")
