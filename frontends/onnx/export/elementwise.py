"""Element-wise operations as ONNX operators."""

from __future__ import annotations

import math
from typing import Any

from torch import fx

from tersor.frontends.onnx.export.table import Export, exports
from tersor.ir.opset.rules import promote

# Computed in the result's type.
_FLOAT = {
    "sqrt": "Sqrt", "reciprocal": "Reciprocal", "exp": "Exp", "log": "Log", "cos": "Cos", "sin": "Sin",
    "tanh": "Tanh", "erf": "Erf", "sigmoid": "Sigmoid", "neg": "Neg", "abs": "Abs",
}  # fmt: skip
_BINARY = {"sub": "Sub", "div": "Div", "pow": "Pow"}
_ON_BOOLEANS = {
    "add": ("Add", "Or"),
    "mul": ("Mul", "And"),
    "maximum": ("Max", "Or"),
    "minimum": ("Min", "And"),
}
_COMPARISONS = {"lt": "Less", "le": "LessOrEqual", "gt": "Greater", "ge": "GreaterOrEqual"}


def _both(e: Export, operator: str, dtype: str | None = None) -> str:
    dtype = dtype or e.result.dtype
    return e.emit(operator, e.operand(0, dtype), e.operand(1, dtype))


@exports(*_FLOAT)
def _unary(e: Export) -> str:
    return e.emit(_FLOAT[e.node.target.name], e.operand(0, e.result.dtype))


@exports(*_BINARY)
def _binary(e: Export) -> str:
    return _both(e, _BINARY[e.node.target.name])


@exports(*_ON_BOOLEANS)
def _also_on_booleans(e: Export) -> str:
    numbers, booleans = _ON_BOOLEANS[e.node.target.name]
    return _both(e, booleans if e.result.dtype == "bool" else numbers)


@exports(*_COMPARISONS)
def _compare(e: Export) -> str:
    dtype = promote(*map(_described, (e.argument(0), e.argument(1))))
    return _both(e, _COMPARISONS[e.node.target.name], "int32" if dtype == "bool" else dtype)


@exports("eq")
def _equal(e: Export) -> str:
    return _both(e, "Equal", promote(*map(_described, (e.argument(0), e.argument(1)))))


@exports("ne")
def _not_equal(e: Export) -> str:
    return e.emit("Not", _equal(e))


def _described(argument: Any) -> Any:
    return argument.meta["value"] if isinstance(argument, fx.Node) else argument


@exports("logical_and")
def _and(e: Export) -> str:
    return _both(e, "And", "bool")


@exports("logical_or")
def _or(e: Export) -> str:
    return _both(e, "Or", "bool")


@exports("logical_not")
def _not(e: Export) -> str:
    return e.emit("Not", e.operand(0, "bool"))


@exports("where")
def _where(e: Export) -> str:
    return e.emit("Where", e.operand(0), *(e.operand(i, e.result.dtype) for i in (1, 2)))


@exports("cast")
def _cast(e: Export) -> str:
    return e.operand(0, e.attribute("dtype"))


@exports("floor", "round")
def _whole(e: Export) -> str:
    if not e.result.is_float:
        return e.operand(0)
    return e.emit({"floor": "Floor", "round": "Round"}[e.node.target.name], e.operand(0))


@exports("relu")
def _relu(e: Export) -> str:
    if e.result.is_float:
        return e.emit("Relu", e.operand(0))
    return e.emit("Max", e.operand(0), e.constant(0, e.result.dtype))


@exports("rsqrt")
def _rsqrt(e: Export) -> str:
    return e.emit("Reciprocal", e.emit("Sqrt", e.operand(0, e.result.dtype)))


@exports("silu")
def _silu(e: Export) -> str:
    return e.emit("Mul", e.operand(0), e.emit("Sigmoid", e.operand(0)))


@exports("gelu", since=20)
def _gelu(e: Export) -> str:
    return e.emit("Gelu", e.operand(0))


@exports("gelu_sigmoid")
def _gelu_sigmoid(e: Export) -> str:
    x = e.operand(0)
    return e.emit("Mul", x, e.emit("Sigmoid", e.emit("Mul", x, e.constant(1.702, e.result.dtype))))


@exports("gelu_tanh", since=20)
def _gelu_tanh(e: Export) -> str:
    return e.emit("Gelu", e.operand(0), approximate="tanh")


@exports("gelu")
def _gelu_spelt_out(e: Export) -> str:
    """x * (1 + erf(x / sqrt(2))) * 0.5, the form that onnxruntime fuses."""
    x = e.operand(0)
    inner = e.emit("Erf", e.emit("Div", x, e.constant(math.sqrt(2), e.result.dtype)))
    grown = e.emit("Mul", x, e.emit("Add", inner, e.constant(1, e.result.dtype)))
    return e.emit("Mul", grown, e.constant(0.5, e.result.dtype))


@exports("gelu_tanh")
def _gelu_tanh_spelt_out(e: Export) -> str:
    """x/2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3)))."""
    x, dtype = e.operand(0), e.result.dtype
    cube = e.emit("Mul", e.emit("Pow", x, e.constant(3, dtype)), e.constant(0.044715, dtype))
    inner = e.emit("Mul", e.emit("Add", x, cube), e.constant(math.sqrt(2 / math.pi), dtype))
    grown = e.emit("Add", e.emit("Tanh", inner), e.constant(1, dtype))
    return e.emit("Mul", e.emit("Mul", x, e.constant(0.5, dtype)), grown)
