"""Functions of vectors of 16 f32 by instructions that only AVX-512 has.

* vpermi2ps looks 16 numbers up in a table of 32, so a polynomial of degree 3 on each of 32 short intervals replaces one
  of degree 12 for all of them: a GELU takes 4 multiplications instead of 18.
* vscalefps multiplies by a power of two, and gives 0 and infinity where the result is beyond f32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from tersor.codegen.kernels.math import EXP, LN_2, LOG2_E, ROUND, bind, constant, polynomial, relu
from tersor.targets import Target

LANES = 16
"""Lanes of the vectors that these functions take."""

INTERVALS, DEGREE = 32, 3


def speaks(target: Target) -> bool:
    """Whether this module's functions are for the target."""
    return "avx512" in target.features


def exp(x: Expr) -> Expr:
    """e**x; relative error 1e-6, denormal results included; 0 below -104, inf beyond the largest f32, NaN kept."""
    x = bind(x)
    return exp_nonpositive(tirx.Select(x > 100.0, constant(100.0, x), x))


def exp_nonpositive(x: Expr) -> Expr:
    """e**x for x <= 100 (one operation fewer than ``exp``); the bits of `math.exp_nonpositive` above -87."""
    x = bind(x)
    x = bind(tirx.Select(x < -150.0, constant(-150.0, x), x))
    n = bind(bind(x * LOG2_E + ROUND) - ROUND)
    fraction = bind(polynomial(EXP, bind(x - n * LN_2)))
    every, rounding = tirx.const(-1, "int16"), tirx.const(4, "int32")
    return T.call_llvm_pure_intrin(
        x.ty.dtype, "llvm.x86.avx512.mask.scalef.ps.512", fraction, n, fraction, every, rounding
    )


def quantize(x: Expr, zero_point: Expr) -> Expr:
    """saturate(round(x) + zero_point) as uint8, for a whole zero point below 2**24; halves to even, NaN becomes 0."""
    zero_point = bind(zero_point)
    low = bind(0.0 - zero_point)
    x = bind(tirx.Select(x > low, x, low))
    every, rounding = tirx.const(-1, "int16"), tirx.const(4, "int32")
    name, number = "llvm.x86.avx512.mask.cvtps2dq.512", f"int32x{LANES}"
    # beyond int32 it is -2**31, of which the largest code is made
    whole = T.call_llvm_pure_intrin(number, name, x, tirx.const(0, number), every, rounding)
    code = tirx.Cast(f"uint32x{LANES}", bind(whole + tirx.Cast(number, zero_point)))
    return tirx.Cast(f"uint8x{LANES}", tirx.min(code, constant(255, code)))


class Gate:
    """``f(x) = max(x, 0) + h(|x|)`` for a function that goes from 0 on the left to x on the right.

    ``h(a) = f(a) - a``: interval i of 32 holds the numbers nearest to ``i bound / 31``, where h is interpolated at
    Chebyshev's nodes. On the first h is -a / 2 and a**2 times a line, so that f(0) is 0; on the last it is 0.

    Args:
        f: the function, in f64.
        bound: from where on ``f(a)`` is a, and ``f(-a)`` is 0, but for rounding.
    """

    def __init__(self, f: Callable[[float], float], bound: float):
        step = bound / (INTERVALS - 1)
        self.bound, self.per_unit = bound, 1 / step
        edges = [(i + 0.5) * step for i in range(INTERVALS - 1)]
        first = _interpolated(lambda a: (f(a) - a / 2) / a**2, 0.0, edges[0], DEGREE - 2)
        rows = [_interpolated(lambda a: f(a) - a, *edge, DEGREE) for edge in pairwise(edges)]
        self.rows = [[0.0, -0.5, *first], *rows, [0.0] * (DEGREE + 1)]

    def __call__(self, x: Expr) -> Expr:
        """f of 16 f32; NaN is kept."""
        x = bind(x)
        a = bind(_magnitude(x, self.bound))
        # of these numbers the lookup reads the lowest 5 bits
        number = bind(tirx.reinterpret(f"int32x{LANES}", a * self.per_unit + ROUND))
        result = self._coefficients(DEGREE, number)
        for power in reversed(range(DEGREE)):
            result = bind(result * a + self._coefficients(power, number))
        return relu(x) + result

    def _coefficients(self, power: int, number: Expr) -> Expr:
        """The coefficient of a**power for the interval of each lane."""
        low, high = (_vector([row[power] for row in half]) for half in (self.rows[:LANES], self.rows[LANES:]))
        return T.call_llvm_pure_intrin(
            f"float32x{LANES}", "llvm.x86.avx512.vpermi2var.ps.512", low, number, high
        )


def _magnitude(x: Expr, bound: float) -> Expr:
    """min(|x|, bound) of 16 f32; the bound for NaN."""
    smaller, every, rounding = tirx.const(0b1010, "int32"), tirx.const(-1, "int16"), tirx.const(4, "int32")
    name, limit = "llvm.x86.avx512.mask.range.ps.512", constant(bound, x)
    return T.call_llvm_pure_intrin(x.ty.dtype, name, x, limit, smaller, x, every, rounding)


def _vector(values: list[float]) -> Expr:
    return tirx.Shuffle([tirx.const(value, "float32") for value in values], list(range(len(values))))


def _interpolated(g: Callable[[float], float], low: float, high: float, degree: int) -> list[float]:
    """The polynomial through g at Chebyshev's nodes of [low, high], lowest power first."""
    middle, half = (low + high) / 2, (high - low) / 2
    nodes = [middle + half * math.cos(math.pi * (2 * i + 1) / (2 * degree + 2)) for i in range(degree + 1)]
    values = [g(node) for node in nodes]
    for order in range(1, degree + 1):  # Newton's divided differences, in place
        for i in reversed(range(order, degree + 1)):
            values[i] = (values[i] - values[i - 1]) / (nodes[i] - nodes[i - order])
    powers = [values[degree]] + [0.0] * degree
    for i in reversed(range(degree)):  # powers * (a - nodes[i]) + values[i]
        shifted = [values[i], *powers[:-1]]
        powers = [s - nodes[i] * p for s, p in zip(shifted, powers, strict=True)]
    return powers


gelu_erf = Gate(lambda a: a * (1 + math.erf(a / math.sqrt(2))) / 2, 5.2)
"""x Phi(x), the GELU; error at most 6e-7 of max(1, |x|), exactly 0 below -5.2."""

gelu_tanh = Gate(lambda a: a * (1 + math.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3))) / 2, 5.2)
"""The GELU's approximation by tanh; error at most 6e-7 of max(1, |x|), exactly 0 below -5.2."""
