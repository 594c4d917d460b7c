"""bf16 arithmetic of AVX-512 (the avx512_bf16 extension), which TVM cannot express: functions in LLVM's own language.

A *word* is two bf16 numbers in an int32, the first in its lower half. Conversions round half to even; they and the
products treat denormals as zeros. Only for targets with "avx512_bf16" among their features.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

FUNCTIONS = """
define <16 x float> @tersor_bf16_dot(<16 x float> %sums, <16 x i32> %left, <16 x i32> %right) alwaysinline {
  %a = bitcast <16 x i32> %left to <32 x bfloat>
  %b = bitcast <16 x i32> %right to <32 x bfloat>
  %r = call <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float> %sums, <32 x bfloat> %a, <32 x bfloat> %b)
  ret <16 x float> %r
}
define <8 x i32> @tersor_bf16_words(<16 x float> %x) alwaysinline {
  %h = fptrunc <16 x float> %x to <16 x bfloat>
  %r = bitcast <16 x bfloat> %h to <8 x i32>
  ret <8 x i32> %r
}
define <16 x i32> @tersor_bf16_pairs(<16 x float> %x, <16 x float> %y) alwaysinline {
  %a = fptrunc <16 x float> %x to <16 x bfloat>
  %b = fptrunc <16 x float> %y to <16 x bfloat>
  %i = bitcast <16 x bfloat> %a to <16 x i16>
  %j = bitcast <16 x bfloat> %b to <16 x i16>
  %low = zext <16 x i16> %i to <16 x i32>
  %up = zext <16 x i16> %j to <16 x i32>
  %high = shl <16 x i32> %up, splat (i32 16)
  %r = or <16 x i32> %low, %high
  ret <16 x i32> %r
}
declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, <32 x bfloat>, <32 x bfloat>)
"""


def functions() -> AbstractContextManager:
    """The part of a kernel that calls the functions below goes inside."""
    return T.attr(T.int32(0), "pragma_import_llvm", FUNCTIONS)


def dot(sums: Expr, left: Expr, right: Expr) -> Expr:
    """16 f32 sums plus both products of each pair of words (vdpbf16ps)."""
    return T.call_extern("float32x16", "tersor_bf16_dot", sums, left, right)


def words(x: Expr) -> Expr:
    """16 f32 as 8 words of neighbours."""
    return T.call_extern("int32x8", "tersor_bf16_words", x)


def pairs(x: Expr, y: Expr) -> Expr:
    """Twice 16 f32 as 16 words: x in the lower halves, y in the upper ones."""
    return T.call_extern("int32x16", "tersor_bf16_pairs", x, y)
