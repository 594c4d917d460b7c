"""Element-wise functions as TIR expressions, right for scalars and vectors of f32, with polynomials instead of libm.

LLVM would call libm once per lane for ``exp`` or ``erf``; these are straight-line vector code. Call them while a
PrimFunc is being built (in a TVMScript body or under an ``IRBuilder``): a value that is used more than once is kept in
a register there, so an expression never grows exponentially.

Errors are against exact arithmetic, measured by tests/codegen/test_math.py. Coefficients come from weighted least
squares on 4000 Chebyshev nodes, reweighted towards the minimax fit (Lawson's iteration), in f64, rounded to f32.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from tersor.codegen.kernels.chain import CODES, Const

LONG_POLYNOMIAL = 7
"""Coefficients from which a polynomial is evaluated in two halves at once."""

ROUND = 12582912.0
"""1.5 * 2**23: adding it rounds an f32 below 2**22 to an integer (half to even), left in the low mantissa bits."""

LOG2_E, LN_2 = 1.4426950408889634, 0.6931471805599453

EXP = (1.0000001192092896, 0.9999997019767761, 0.49998894333839417,
       0.16667574644088745, 0.04191543161869049, 0.008297644555568695)  # fmt: skip
"""e**r on |r| <= ln(2)/2, lowest power first; relative error 7.5e-8."""

NORMAL_CDF_BOUND = 5.3
NORMAL_CDF = (0.13339252769947052, -0.06651699542999268, 0.04926713928580284, -0.0396355465054512,
              0.03204883635044098, -0.02489127218723297, 0.019008183851838112, -0.014697996899485588,
              0.00888399314135313, -0.003133646911010146, 0.002625663997605443, -0.003424719674512744,
              0.001413525897078216)  # fmt: skip
"""(Phi(x) - 1/2) / x on |x| <= 5.3 in t = 2 (x/5.3)**2 - 1; x times its error is 4.2e-7. Phi(-5.3) comes out < 0."""

ERF_BOUND = 3.8
ERF = (0.37210747599601746, -0.18563584983348846, 0.13774962723255157, -0.11135030537843704, 0.09073028713464737,
       -0.07107798755168915, 0.055314239114522934, -0.04427871108055115, 0.026977883651852608, -0.008750580251216888,
       0.008032528683543205, -0.011513122357428074, 0.004852671176195145)  # fmt: skip
"""erf(x) / x on |x| <= 3.8 in t = 2 (x/3.8)**2 - 1; x times its error is 1.1e-6."""

TANH_BOUND = 8.0
TANH_NUMERATOR = (0.9999997615814209, 0.12712311744689941, 0.0026964102871716022, 7.162507699831622e-06,
                  -6.142313324630777e-09)  # fmt: skip
TANH_DENOMINATOR = (1.0, 0.4604547321796417, 0.02285030297935009, 0.00019674529903568327)
"""tanh(x) / x on |x| <= 8 as a quotient of polynomials in x**2; relative error 2.2e-7."""

SQRT_HALF_BITS, ONE_BITS = 0x3F3504F3, 0x3F800000
LOG1P = (0.3333333134651184, -0.250008225440979, 0.20001226663589478, -0.16623355448246002, 0.1420176774263382,
         -0.13160210847854614, 0.12761515378952026, -0.07634343951940536)  # fmt: skip
"""(log(1+f) - f + f**2/2) / f**3 on [sqrt(1/2) - 1, sqrt(2) - 1]; relative error of the logarithm 5.8e-9."""

SIN = (-0.16666659712791443, 0.00833306647837162, -0.00019809589139185846, 2.605749841677607e-06)
"""(sin(r) - r) / r**3 on |r| <= pi/2 in r**2; relative error of the sine 6.1e-9."""
PI_PARTS = (3.140625, 0.0009675025939941406, 1.5099580252808664e-07)
"""Their sum is pi to 3.4e-15; the first two have so few bits that multiples up to 2**12 are exact in f32."""


def bind(value: Expr | int) -> Expr | int:
    """A register that holds the value, so that it is computed once; variables and constants are returned as they are.

    It is a local buffer, not a let: TVM's simplifier looks through lets, at a cost exponential in their depth.
    """
    if isinstance(value, int | tirx.Var) or _is_constant(value) or element_of(value) == "bool":
        return value  # comparisons cost less than keeping them, and TVM cannot lower every store of bools
    lanes = lanes_of(value)
    register = T.alloc_buffer((lanes,), element_of(value), scope="global")
    at = T.ramp(0, 1, lanes) if lanes > 1 else 0
    T.buffer_store(register, value, [at])
    return register[at]


def broadcast(value: Expr, lanes: int) -> Expr:
    """A scalar as a vector of so many lanes; a vector unchanged."""
    return tirx.Broadcast(value, lanes) if lanes > 1 and lanes_of(value) == 1 else value


def constant(value: float | int | bool, like: Expr) -> Expr:
    """The constant in the dtype and lanes of ``like``."""
    return tirx.const(value, like.ty.dtype)


def exp(x: Expr) -> Expr:
    """e**x; relative error 1e-6 up to 88.3, 3e-4 from there to the overflow at 88.73; 0 below -87.7, NaN kept."""
    x = bind(x)
    low = bind(tirx.Select(x < -88.0, constant(-88.0, x), x))
    shifted = bind(low * LOG2_E + ROUND)
    # 2**127 is the largest power that is finite: beyond it the remainder grows until the product overflows
    shifted = bind(tirx.Select(shifted > ROUND + 127, constant(ROUND + 127, x), shifted))
    return _exp_of_parts(low, shifted)


def exp_nonpositive(x: Expr) -> Expr:
    """e**x for x <= 0 (one operation fewer than ``exp``); 0 below -87.7, -inf included."""
    x = bind(x)
    low = bind(tirx.Select(x < -88.0, constant(-88.0, x), x))
    return _exp_of_parts(low, bind(low * LOG2_E + ROUND))


def log(x: Expr) -> Expr:
    """Natural logarithm; relative error 3e-7, denormals included; -inf at 0, NaN below, inf at inf."""
    x = bind(x)
    tiny = bind(x < 1.1754943508222875e-38)
    normal = bind(tirx.Select(tiny, x * 8388608.0, x))
    bits = bind(tirx.reinterpret(_dtype("int32", x), normal))
    exponent = bind(tirx.shift_right(bits - SQRT_HALF_BITS, constant(23, bits)))
    f = bind(tirx.reinterpret(x.ty.dtype, bits - tirx.shift_left(exponent, constant(23, bits))) - 1.0)
    n = bind(cast(exponent, "float32") - tirx.Select(tiny, constant(23.0, x), constant(0.0, x)))
    square_ = bind(f * f)
    tail = f * square_ * polynomial(LOG1P, f) - 0.5 * square_
    # n * LN_2 in two parts, the first exact: otherwise logarithms near 0 lose digits
    result = bind(n * 0.693145751953125 + (f + (n * 1.42860682030941723e-06 + tail)))
    infinite = constant(float("inf"), x)
    result = tirx.Select(x < float("inf"), result, x)  # inf and NaN
    result = tirx.Select(
        x > 0.0, result, tirx.Select(tirx.EQ(x, constant(0.0, x)), -infinite, x * float("nan"))
    )
    return result


def sin(x: Expr) -> Expr:
    """Sine; absolute error 3e-7 for |x| <= 1e4, growing in proportion beyond."""
    x = bind(x)
    shifted = bind(x * 0.3183098861837907 + ROUND)
    return _sin_reduced(x, bind(shifted - ROUND), shifted)


def cos(x: Expr) -> Expr:
    """Cosine; absolute error 3e-7 for |x| <= 1e4, growing in proportion beyond."""
    # cos(x) = +-sin(x - (n - 1/2) pi), n the integer nearest to x/pi + 1/2
    x = bind(x)
    shifted = bind((x * 0.3183098861837907 + 0.5) + ROUND)
    return _sin_reduced(x, bind((shifted - ROUND) - 0.5), shifted)


def tanh(x: Expr) -> Expr:
    """Hyperbolic tangent; relative error 6e-7."""
    x = bind(clamp(x, TANH_BOUND))
    square_ = bind(x * x)
    return x * polynomial(TANH_NUMERATOR, square_) / polynomial(TANH_DENOMINATOR, square_)


def erf(x: Expr) -> Expr:
    """Error function; absolute error 1.3e-6."""
    x = bind(clamp(x, ERF_BOUND))
    return x * polynomial(ERF, bind(x * x * (2 / ERF_BOUND**2) - 1.0))


def sigmoid(x: Expr) -> Expr:
    """1 / (1 + e**-x); relative error 8e-7."""
    return 1.0 / (1.0 + exp(0.0 - x))


def silu(x: Expr) -> Expr:
    """x sigmoid(x); relative error 8e-7."""
    x = bind(x)
    return x / (1.0 + exp(0.0 - x))


def gelu_erf(x: Expr) -> Expr:
    """x Phi(x), the GELU; error at most 6e-7 of max(1, |x|), exactly 0 below -5.3."""
    x = bind(x)
    bounded = bind(clamp(x, NORMAL_CDF_BOUND))
    phi = bind(
        0.5 + bounded * polynomial(NORMAL_CDF, bind(bounded * bounded * (2 / NORMAL_CDF_BOUND**2) - 1.0))
    )
    return x * relu(phi)


def gelu_tanh(x: Expr) -> Expr:
    """The GELU's approximation x (1 + tanh(u)) / 2 = x sigmoid(2u); relative error 2e-6 where |x| <= 5."""
    x = bind(x)
    return x / (1.0 + exp(x * (-1.5957691216057308 - 0.07135481282553536 * (x * x))))


def gelu_sigmoid(x: Expr) -> Expr:
    """The GELU's approximation x sigmoid(1.702 x); relative error 2e-6 where |x| <= 5."""
    x = bind(x)
    return x / (1.0 + exp(x * -1.702))


def horizontal(operation: Callable[[Expr, Expr], Expr], x: Expr) -> Expr:
    """One value from all lanes of a vector, by halving it (LLVM's own ordered sum is sequential)."""
    lanes, element = lanes_of(x), element_of(x)
    x = bind(x)
    while lanes > 2:
        lanes //= 2
        dtype = f"{element}x{lanes}"
        x = bind(operation(T.vectorlow(dtype, x), T.vectorhigh(dtype, x)))
    return bind(operation(tirx.Shuffle([x], [0]), tirx.Shuffle([x], [1]))) if lanes == 2 else x


def relu(x: Expr) -> Expr:
    """max(x, 0), NaN kept."""
    x = bind(x)
    return tirx.Select(x < constant(0, x), constant(0, x), x)


def clamp(x: Expr, bound: float) -> Expr:
    """x limited to [-bound, bound], NaN kept."""
    x = bind(x)
    x = bind(tirx.Select(x < -bound, constant(-bound, x), x))
    return tirx.Select(x > bound, constant(bound, x), x)


def maximum(a: Expr, b: Expr) -> Expr:
    """The larger one; NaN if either is, like torch.maximum."""
    a, b = (bind(b), bind(a)) if _is_constant(a) else (bind(a), bind(b))
    if _is_number(b):
        return tirx.Select(a < b, b, a)  # one instruction, and a NaN stays
    return tirx.Select(a > b, a, _unordered(b >= a, a, b))


def minimum(a: Expr, b: Expr) -> Expr:
    """The smaller one; NaN if either is, like torch.minimum."""
    a, b = (bind(b), bind(a)) if _is_constant(a) else (bind(a), bind(b))
    if _is_number(b):
        return tirx.Select(a > b, b, a)
    return tirx.Select(a < b, a, _unordered(b <= a, a, b))


def power(x: Expr, exponent: Expr | Const) -> Expr:
    """x**exponent. Small integers multiply, 1/2 and -1/2 take roots, other constants are e**(exponent log x),
    with a relative error of 3e-7 (1 + |exponent log x|) and NaN for x < 0."""
    x = bind(x)
    if not isinstance(exponent, Const):
        if not is_float(x):
            raise ValueError("pow of integers needs a constant exponent")
        return exp(cast(exponent, "float32") * log(x))
    e = exponent.value
    if float(e).is_integer() and abs(e) <= 32 and (e >= 0 or is_float(x)):
        result, factor, bits = constant(1, x), x, abs(int(e))
        while bits:
            if bits & 1:
                result = bind(result * factor)
            factor, bits = bind(factor * factor) if bits > 1 else factor, bits >> 1
        return result if e >= 0 else 1.0 / result
    x = cast(x, "float32")
    if abs(e) == 0.5:
        return tirx.sqrt(x) if e > 0 else 1.0 / tirx.sqrt(x)
    return exp(float(e) * log(x))


def divide(a: Expr, b: Expr) -> Expr:
    """True division; integers are divided as f32."""
    return cast(a, "float32") / cast(b, "float32")


def absolute(x: Expr) -> Expr:
    """|x|."""
    x = bind(x)
    return tirx.abs(x) if is_float(x) else tirx.Select(x < constant(0, x), constant(0, x) - x, x)


def floor(x: Expr) -> Expr:
    """The largest integer not above x, in the dtype of x."""
    return tirx.floor(x) if is_float(x) else x


def round_even(x: Expr) -> Expr:
    """The nearest integer, the even one of two that are equally near, in the dtype of x."""
    # TVM's own nearbyint calls libm for every lane; of LLVM's only this one is in every libm, which ARMv7 needs
    return T.call_llvm_pure_intrin(x.ty.dtype, "llvm.nearbyint", x) if is_float(x) else x


def saturate(x: Expr, dtype: str) -> Expr:
    """An integral f32 as a code of this dtype, limited to its range; NaN becomes the lowest code."""
    low, high = (constant(bound, x) for bound in CODES[dtype])
    x = bind(tirx.Select(x > low, x, low))
    x = tirx.Select(x < high, x, high)
    return cast(x, dtype)


def where(condition: Expr, a: Expr, b: Expr) -> Expr:
    """a where the condition holds, b elsewhere; both are computed."""
    return tirx.Select(cast(condition, "bool"), a, b)


def cast(x: Expr, dtype: str) -> Expr:
    """The value in another dtype: integers get floats cut towards zero, bf16 the nearest; a bool is ``x != 0``."""
    if element_of(x) == dtype:
        return x
    if dtype == "bool":
        return tirx.NE(x, constant(0, x))
    if dtype == "bfloat16":
        return tirx.Cast(_dtype(dtype, x), _round_to_bf16(cast(x, "float32")))
    if dtype in CODES and is_float(x):
        x = tirx.Cast(_dtype("int32", x), x)  # LLVM has no good conversion from f32 to bytes
    return tirx.Cast(_dtype(dtype, x), x)


def float_of_bf16(bits: Expr) -> Expr:
    """The f32 that bf16 numbers are, given as their bits (uint16): its upper half."""
    words = tirx.Cast(_dtype("int32", bits), bits)
    return tirx.reinterpret(_dtype("float32", bits), tirx.shift_left(words, constant(16, words)))


def _round_to_bf16(x: Expr) -> Expr:
    """The nearest f32 that bf16 can hold, half to even. TVM drops a cast to bf16 and back; LLVM drops its second
    rounding of these numbers."""
    x = bind(x)
    bits = bind(tirx.reinterpret(_dtype("int32", x), x))
    odd = tirx.bitwise_and(tirx.shift_right(bits, constant(16, bits)), constant(1, bits))
    rounded = tirx.Select(tirx.EQ(x, x), bits + odd + 0x7FFF, tirx.bitwise_or(bits, constant(0x400000, bits)))
    return tirx.reinterpret(x.ty.dtype, bind(tirx.bitwise_and(rounded, constant(-0x10000, bits))))


def _exp_of_parts(x: Expr, shifted: Expr) -> Expr:
    """2**n e**(x - n ln 2), where ``shifted`` is n + ROUND and n >= -127; 2**-127 becomes 0."""
    r = bind(x - (shifted - ROUND) * LN_2)
    bits = tirx.reinterpret(_dtype("int32", x), shifted)
    # the shift drops ROUND's own bits and leaves n where the exponent belongs
    scale = tirx.shift_left(bits, tirx.const(23, _dtype("int32", x))) + ONE_BITS
    return polynomial(EXP, r) * tirx.reinterpret(x.ty.dtype, scale)


def _sin_reduced(x: Expr, multiple: Expr, shifted: Expr) -> Expr:
    """sin(x - multiple * pi) with the sign of (-1)**n, n being the low bits of ``shifted``."""
    r = x
    for part in PI_PARTS:
        r = bind(r - multiple * part)
    square_ = bind(r * r)
    value = bind(r + r * square_ * polynomial(SIN, square_))
    bits = tirx.reinterpret(_dtype("int32", x), shifted)
    sign = tirx.shift_left(bits, tirx.const(31, _dtype("int32", x)))
    return tirx.reinterpret(x.ty.dtype, tirx.bitwise_xor(tirx.reinterpret(_dtype("int32", x), value), sign))


def polynomial(coefficients: tuple[float, ...], x: Expr) -> Expr:
    """The value at x, lowest power first; long ones as two in x**2, which do not wait for each other."""
    if len(coefficients) < LONG_POLYNOMIAL:
        return _horner(coefficients, x)
    square = bind(x * x)
    return bind(_horner(coefficients[::2], square) + x * _horner(coefficients[1::2], square))


def _horner(coefficients: tuple[float, ...], x: Expr) -> Expr:
    result = constant(coefficients[-1], x)
    for coefficient in reversed(coefficients[:-1]):
        result = result * x + coefficient
    return bind(result)


def _unordered(either: Expr, a: Expr, b: Expr) -> Expr:
    """``b``, or NaN where ``either`` is false because one of a and b is NaN (an integer never is)."""
    if not is_float(a):
        return b
    return tirx.Select(either, b, a + b)


def _is_constant(x: Expr) -> bool:
    return isinstance(x.value if isinstance(x, tirx.Broadcast) else x, tirx.IntImm | tirx.FloatImm)


def _is_number(x: Expr) -> bool:
    """A constant, but not NaN."""
    value = x.value if isinstance(x, tirx.Broadcast) else x
    return _is_constant(x) and value.value == value.value


def lanes_of(x: Expr) -> int:
    """Lanes of a vector, 1 of a scalar."""
    return x.ty.dtype.lanes


def element_of(x: Expr) -> str:
    """The dtype of a lane."""
    return str(x.ty.dtype).partition("x")[0]


def is_float(x: Expr) -> bool:
    """Whether the lanes are floats."""
    return element_of(x).startswith("float")


def _dtype(element: str, like: Expr) -> str:
    lanes = lanes_of(like)
    return element if lanes == 1 else f"{element}x{lanes}"
