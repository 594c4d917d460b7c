"""Element-wise ONNX operators, and those of one element at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from tersor.frontends.aten import truncated
from tersor.frontends.onnx.reader import dtype_name
from tersor.frontends.onnx.table import Call, converts, dtype, joint_shape, size, value
from tersor.frontends.onnx.values import Known

# Mark of a cast from float32 that changes no value; without it a quantized model would go to and fro.
WHOLE = "holds_whole_numbers"
_UNARY = {
    "Neg": "neg", "Abs": "abs", "Sqrt": "sqrt", "Reciprocal": "reciprocal", "Exp": "exp", "Log": "log",
    "Floor": "floor", "Round": "round", "Cos": "cos", "Sin": "sin", "Tanh": "tanh", "Erf": "erf", "Sigmoid": "sigmoid",
    "Relu": "relu", "Not": "logical_not",
}  # fmt: skip
_BINARY = {
    "Add": "add", "Sub": "sub", "Mul": "mul", "Less": "lt", "LessOrEqual": "le", "Greater": "gt",
    "GreaterOrEqual": "ge", "Equal": "eq",
}  # fmt: skip


def _unary(name: str) -> Callable[[Call], fx.Node]:
    return lambda c: c.build.emit(name, c.node(0))


def _binary(name: str) -> Callable[[Call], fx.Node]:
    return lambda c: c.build.emit(name, *c.operands())


for _onnx, _ours in _UNARY.items():
    converts(_onnx)(_unary(_ours))
for _onnx, _ours in _BINARY.items():
    converts(_onnx)(_binary(_ours))


@converts("And")
def _and(c: Call) -> fx.Node:
    return c.build.logical_and(c.node(0), c.node(1))


@converts("Or")
def _or(c: Call) -> fx.Node:
    return c.build.logical_or(c.node(0), c.node(1))


@converts("Xor")
def _xor(c: Call) -> fx.Node:
    return c.build.ne(c.node(0), c.node(1))


@converts("Identity")
def _identity(c: Call) -> Any:
    return c.require(0)


@converts("Dropout")
def _dropout(c: Call) -> Any:
    """Nothing outside of training; its mask is true everywhere."""
    if c.number(2, False):
        raise c.refuse("is in training mode", fix="export the model in evaluation mode")
    if c.results < 2 or not c.operator.outputs[1]:
        return c.require(0)
    return c.require(0), c.build.full(shape=size(c.require(0)), value=True, dtype="bool")


@converts("Div")
def _div(c: Call) -> fx.Node:
    x, y = c.operands()
    name = dtype(c.require(0))
    if name.startswith("float") or name == "bfloat16":
        return c.build.div(x, y)
    return c.cast(truncated(c.build, _float64_quotient(c, x, y)), name)


def _float64_quotient(c: Call, x: Any, y: Any) -> fx.Node:
    """float64 holds every quotient of integers below 2^53."""
    x, y = (c.cast(v, "float64") if isinstance(v, fx.Node) else float(v) for v in (x, y))
    return c.build.div(x, y)


@converts("Mod")
def _mod(c: Call) -> fx.Node:
    """The sign of y (Python's %), or of x where ``fmod`` is set."""
    x, y = c.operands()
    name = dtype(c.require(0))
    exact = name.startswith("float")
    quotient = c.build.div(x, y) if exact else _float64_quotient(c, x, y)
    whole = truncated(c.build, quotient) if c.attribute("fmod", 0) else c.build.floor(quotient)
    return c.build.sub(x, c.build.mul(c.cast(whole, name), y))


@converts("Pow")
def _pow(c: Call) -> fx.Node:
    """The result has the type of the base."""
    x, y = c.operands()
    name = dtype(c.require(0))
    if isinstance(y, float) and y.is_integer():
        y = int(y)
    if isinstance(y, fx.Node) and not value(y).is_float:
        y = c.cast(y, name)
    elif isinstance(y, fx.Node):  # of whole numbers a fractional power is taken in fractions
        wide = name if name.startswith("float") or name == "bfloat16" else "float64"
        x, y = (c.cast(v, wide) if isinstance(v, fx.Node) else v for v in (x, y))
    return c.cast(c.build.pow(x, y), name)


@converts("Ceil")
def _ceil(c: Call) -> fx.Node:
    return c.build.neg(c.build.floor(c.build.neg(c.node(0))))


@converts("Sign")
def _sign(c: Call) -> fx.Node:
    x, name = c.node(0), dtype(c.require(0))
    return c.build.sub(c.cast(c.build.gt(x, 0), name), c.cast(c.build.lt(x, 0), name))


@converts("IsNaN")
def _is_nan(c: Call) -> fx.Node:
    return c.build.ne(c.node(0), c.node(0))


@converts("IsInf")
def _is_inf(c: Call) -> fx.Node:
    x = c.node(0)
    above, below = c.build.eq(x, float("inf")), c.build.eq(x, float("-inf"))
    if not c.attribute("detect_negative", 1):
        return above
    return c.build.logical_or(above, below) if c.attribute("detect_positive", 1) else below


@converts("Min")
def _min(c: Call) -> Any:
    return _accumulated(c, "minimum")


@converts("Max")
def _max(c: Call) -> Any:
    return _accumulated(c, "maximum")


@converts("Sum")
def _sum(c: Call) -> Any:
    return _accumulated(c, "add")


def _accumulated(c: Call, name: str) -> Any:
    if len(c.inputs) == 1:
        return c.require(0)
    first, *others = c.operands()
    for other in others:
        first = c.build.emit(name, first, other)
    return first


@converts("Mean")
def _mean(c: Call) -> fx.Node:
    return c.build.div(_accumulated(c, "add"), len(c.inputs)) if len(c.inputs) > 1 else c.node(0)


@converts("Clip", since=11)
def _clip(c: Call) -> fx.Node:
    x = c.node(0)
    for i, name in ((1, "maximum"), (2, "minimum")):
        if c.given(i):
            bound = c.known(i)
            x = c.build.emit(name, x, bound.number() if bound else c.node(i))
    return x


@converts("Where")
def _where(c: Call) -> fx.Node:
    condition, x, y = c.node(0), c.require(1), c.require(2)
    shape = joint_shape(condition, x, y)
    # Numbers take float32 or int64 upon themselves.
    plain = dtype(x) in ("float32", "int64")
    x, y = (
        v.number()
        if isinstance(v, Known) and v.sizes is None and v.is_number and plain and len(v.shape) <= len(shape)
        else c.as_node(v)
        for v in (x, y)
    )
    return c.reshape(c.build.where(condition, x, y), shape)


@converts("Cast")
def _cast(c: Call) -> fx.Node:
    x, name = c.node(0), dtype_name(c.attribute("to"))
    if x.meta.get(WHOLE) and name == "float32":
        return x.args[0]
    return c.build.cast(x, dtype=name)


@converts("CastLike")
def _cast_like(c: Call) -> fx.Node:
    return c.build.cast(c.node(0), dtype=dtype(c.require(1)))


# -- activations


@converts("Gelu", since=20)
def _gelu(c: Call) -> fx.Node:
    return c.build.gelu_tanh(c.node(0)) if c.attribute("approximate") == "tanh" else c.build.gelu(c.node(0))


@converts("Swish", since=24)
def _swish(c: Call) -> fx.Node:
    x, alpha = c.node(0), c.attribute("alpha", 1.0)
    return c.build.silu(x) if alpha == 1 else c.build.mul(x, c.build.sigmoid(c.build.mul(x, alpha)))


@converts("HardSigmoid")
def _hard_sigmoid(c: Call) -> fx.Node:
    return _hard(c, c.node(0), c.attribute("alpha", 0.2), c.attribute("beta", 0.5))


@converts("HardSwish")
def _hard_swish(c: Call) -> fx.Node:
    return c.build.mul(c.node(0), _hard(c, c.node(0), 1 / 6, 0.5))


def _hard(c: Call, x: fx.Node, alpha: float, beta: float) -> fx.Node:
    return c.build.minimum(c.build.maximum(c.build.add(c.build.mul(x, alpha), beta), 0.0), 1.0)


@converts("LeakyRelu")
def _leaky_relu(c: Call) -> fx.Node:
    x = c.node(0)
    return c.build.where(c.build.lt(x, 0), c.build.mul(x, c.attribute("alpha", 0.01)), x)


@converts("PRelu")
def _prelu(c: Call) -> fx.Node:
    x = c.node(0)
    return c.build.where(c.build.lt(x, 0), c.build.mul(x, c.operands()[1]), x)


@converts("Elu")
def _elu(c: Call) -> fx.Node:
    x = c.node(0)
    below = c.build.mul(c.build.sub(c.build.exp(c.build.minimum(x, 0.0)), 1.0), c.attribute("alpha", 1.0))
    return c.build.where(c.build.lt(x, 0), below, x)


@converts("Softplus")
def _softplus(c: Call) -> fx.Node:
    """max(x, 0) + log(1 + exp(-|x|)), which does not overflow."""
    x = c.node(0)
    rest = c.build.log(c.build.add(c.build.exp(c.build.neg(c.build.abs(x))), 1.0))
    return c.build.add(c.build.relu(x), rest)


@converts("Softsign")
def _softsign(c: Call) -> fx.Node:
    return c.build.div(c.node(0), c.build.add(c.build.abs(c.node(0)), 1.0))


@converts("Tan")
def _tan(c: Call) -> fx.Node:
    return c.build.div(c.build.sin(c.node(0)), c.build.cos(c.node(0)))


@converts("Sinh")
def _sinh(c: Call) -> fx.Node:
    x = c.node(0)
    return c.build.mul(c.build.sub(c.build.exp(x), c.build.exp(c.build.neg(x))), 0.5)


@converts("ThresholdedRelu")
def _thresholded_relu(c: Call) -> fx.Node:
    x = c.node(0)
    return c.build.where(c.build.gt(x, c.attribute("alpha", 1.0)), x, 0.0)


@converts("Mish", since=18)
def _mish(c: Call) -> fx.Node:
    return c.build.mul(c.node(0), c.build.tanh(_softplus(c)))


@converts("Selu")
def _selu(c: Call) -> fx.Node:
    x = c.node(0)
    alpha, gamma = c.attribute("alpha", 1.6732631921768188), c.attribute("gamma", 1.0507010221481323)
    below = c.build.mul(c.build.sub(c.build.exp(c.build.minimum(x, 0.0)), 1.0), alpha)
    return c.build.mul(c.build.where(c.build.lt(x, 0), below, x), gamma)


@converts("Celu", since=12)
def _celu(c: Call) -> fx.Node:
    x, alpha = c.node(0), c.attribute("alpha", 1.0)
    below = c.build.sub(c.build.exp(c.build.mul(c.build.minimum(x, 0.0), 1 / alpha)), 1.0)
    return c.build.add(c.build.relu(x), c.build.mul(below, alpha))
