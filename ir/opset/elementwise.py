"""Element-wise operations, with numpy's broadcasting and torch's type promotion."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from tersor.errors import ProgramError
from tersor.ir.dialect import Op, ops
from tersor.ir.opset.rules import broadcast, operand_shapes, promote, require_float, same_float
from tersor.ir.value import DTYPES, Value


def _infer(*operands: Any, **_: Any) -> Value:
    return Value(promote(*operands), broadcast(*operand_shapes(*operands)))


def _infer_float(*operands: Any, **_: Any) -> Value:
    dtype = promote(*operands)
    return Value(
        dtype if DTYPES[dtype].is_floating_point else "float32", broadcast(*operand_shapes(*operands))
    )


def _infer_bool(*operands: Any, **_: Any) -> Value:
    return Value("bool", broadcast(*operand_shapes(*operands)))


def _infer_cast(x: Value, *, dtype: str) -> Value:
    if dtype not in DTYPES:
        raise ProgramError(f"cast to the unknown type {dtype!r}", fix=f"use one of {', '.join(DTYPES)}")
    return Value(dtype, x.shape)


def _infer_saturate(x: Value, *, dtype: str) -> Value:
    if dtype not in ("int8", "uint8"):
        raise ProgramError(f"saturate to {dtype!r}", fix="use int8 or uint8")
    require_float("saturate", x)
    return Value(dtype, x.shape)


def _infer_where(condition: Value, x: Any, y: Any) -> Value:
    if condition.dtype != "bool":
        raise ProgramError(f"where: the condition is {condition}, not bool")
    return Value(promote(x, y), broadcast(*operand_shapes(condition, x, y)))


def _infer_logical(*operands: Value) -> Value:
    return Value("bool", broadcast(*(x.shape for x in operands)))


def _infer_pow(x: Any, y: Any) -> Value:
    result = _infer(x, y)
    if result.dtype == "bool":
        raise ProgramError(f"a power of booleans: {x}, {y}", fix="cast to int64 first")
    return result


def _arithmetic(rule: Callable[..., Value]) -> Callable[..., Value]:
    """The rule of an operation that torch does not define on booleans."""

    def infer(*operands: Any) -> Value:
        if any(isinstance(x, Value) and x.dtype == "bool" for x in operands):
            raise ProgramError(
                f"arithmetic on booleans: {', '.join(map(str, operands))}", fix="cast to int64 first"
            )
        return rule(*operands)

    return infer


def _tensors(x: Any, y: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Two operands of which one may be a Python number, as tensors of the promoted type."""
    dtype = torch.result_type(x, y)
    return torch.as_tensor(x, dtype=dtype), torch.as_tensor(y, dtype=dtype)


def add(x, y):
    """x + y."""
    return torch.add(x, y)


def sub(x, y):
    """x - y."""
    return torch.sub(x, y)


def mul(x, y):
    """x * y."""
    return torch.mul(x, y)


def div(x, y):
    """x / y in floating point."""
    return torch.div(x, y)


def pow(x, y):
    """x ** y."""
    return torch.pow(x, y)


def maximum(x, y):
    """The larger of x and y; NaN wins."""
    return torch.maximum(*_tensors(x, y))


def minimum(x, y):
    """The smaller of x and y; NaN wins."""
    return torch.minimum(*_tensors(x, y))


def neg(x):
    """-x."""
    return torch.neg(x)


def abs(x):
    """|x|."""
    return torch.abs(x)


def sqrt(x):
    """Square root."""
    return torch.sqrt(x)


def rsqrt(x):
    """1 / sqrt(x)."""
    return torch.rsqrt(x)


def reciprocal(x):
    """1 / x."""
    return torch.reciprocal(x)


def exp(x):
    """e ** x."""
    return torch.exp(x)


def log(x):
    """Natural logarithm."""
    return torch.log(x)


def floor(x):
    """The largest whole number not above x."""
    return torch.floor(x)


def round(x):
    """The nearest whole number, the even one of two that are equally near."""
    return torch.round(x)


def cos(x):
    """Cosine of x radians."""
    return torch.cos(x)


def sin(x):
    """Sine of x radians."""
    return torch.sin(x)


def tanh(x):
    """Hyperbolic tangent."""
    return torch.tanh(x)


def erf(x):
    """Gauss error function."""
    return torch.erf(x)


def sigmoid(x):
    """1 / (1 + exp(-x))."""
    return torch.sigmoid(x)


def silu(x):
    """x * sigmoid(x), also called Swish (Elfwing et al. 2017)."""
    return F.silu(x)


def relu(x):
    """max(x, 0)."""
    return torch.relu(x)


def gelu(x):
    """x * Phi(x) with the exact normal distribution (Hendrycks & Gimpel 2016, eq. 1)."""
    return F.gelu(x)


def gelu_tanh(x):
    """The tanh form of GELU: x/2 * (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))."""
    return F.gelu(x, approximate="tanh")


def gelu_sigmoid(x):
    """The sigmoid form of GELU: x * sigmoid(1.702 x) (Hendrycks & Gimpel 2016, section 2)."""
    return x * torch.sigmoid(1.702 * x)


def where(condition, x, y):
    """x where the boolean condition holds, y elsewhere."""
    return torch.where(condition, x, y)


def cast(x, *, dtype: str):
    """x converted to ``dtype``."""
    return x.to(DTYPES[dtype])


def saturate(x, *, dtype: str):
    """x limited to the range of ``dtype`` (int8 or uint8), then converted to it."""
    limits = torch.iinfo(DTYPES[dtype])
    return x.clamp(limits.min, limits.max).to(DTYPES[dtype])


def _decompose_saturate(build: Any, x: Any, *, dtype: str) -> Any:
    limits = torch.iinfo(DTYPES[dtype])
    return build.cast(build.minimum(build.maximum(x, float(limits.min)), float(limits.max)), dtype=dtype)


def eq(x, y):
    """x == y."""
    return x == y


def ne(x, y):
    """x != y."""
    return x != y


def lt(x, y):
    """x < y."""
    return x < y


def le(x, y):
    """x <= y."""
    return x <= y


def gt(x, y):
    """x > y."""
    return x > y


def ge(x, y):
    """x >= y."""
    return x >= y


def logical_and(x, y):
    """Both are true."""
    return torch.logical_and(x, y)


def logical_or(x, y):
    """At least one is true."""
    return torch.logical_or(x, y)


def logical_not(x):
    """x is false."""
    return torch.logical_not(x)


def _register(function: Callable[..., Any], infer: Callable[..., Value], chain: str | None = None) -> Op:
    name = function.__name__
    return ops.register(Op(name, function, infer, elementwise=chain or name))


for _function in (add, mul):
    _register(_function, _infer)
_register(pow, _infer_pow)
for _function in (sub, neg, abs, floor, round, relu):
    _register(_function, _arithmetic(_infer))
_register(maximum, _infer, "max")
_register(minimum, _infer, "min")
for _function in (div, sqrt, rsqrt, reciprocal, exp, log, cos, sin, tanh, erf, sigmoid):
    _register(_function, _infer_float)
_register(silu, same_float)
_register(gelu, same_float, "gelu_erf")
_register(gelu_tanh, same_float)
_register(gelu_sigmoid, same_float)
for _function in (eq, ne, lt, le, gt, ge):
    _register(_function, _infer_bool)
for _function in (logical_and, logical_or, logical_not):
    _register(_function, _infer_logical)
_register(where, _infer_where)
_register(cast, _infer_cast)
ops.register(Op("saturate", saturate, _infer_saturate, decompose=_decompose_saturate, elementwise="saturate"))
