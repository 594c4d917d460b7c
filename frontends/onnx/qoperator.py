"""Operators on codes (QOperator files): their operands are decoded, the operator is that of fractions, its result is
encoded.

Source: the ONNX operators' own pages, and docs/ContribOperators.md of onnxruntime.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from tersor.frontends.onnx.contrib import attention, embed_layer_norm
from tersor.frontends.onnx.quantized import ONE, as_float, as_integers, decoded, encoded, product
from tersor.frontends.onnx.reader import STANDARD
from tersor.frontends.onnx.table import MICROSOFT, Call, converts, dtype, find_converter, size
from tersor.frontends.onnx.values import Known

_NEWEST = 23


def _operand(c: Call, i: int, axis: int = 1) -> Any:
    """Codes, scale and zero point at i, i + 1 and i + 2, decoded; stored ones stay known."""
    return decoded(c, c.require(i), c.require(i + 1), _optional(c, i + 2), axis)


def _optional(c: Call, i: int) -> Any:
    return c.inputs[i] if c.given(i) else None


def _result(c: Call, x: fx.Node, i: int) -> Any:
    """x in codes with the scale at i and the zero point at i + 1."""
    zero = _optional(c, i + 1)
    return encoded(c, x, c.require(i), zero, 1, "uint8" if zero is None else dtype(zero))


def _apply(c: Call, operator: str, *inputs: Any, **attributes: Any) -> fx.Node:
    """A standard operator on these operands, with this one's attributes and others."""
    converter = find_converter(STANDARD, operator, attributes.pop("version", _NEWEST))
    result = converter(c.on(inputs, {**c.attributes, **attributes}))
    return c.as_node(result)


@converts("QLinearMatMul", since=10)
def _matmul(c: Call) -> fx.Node:
    a, b = ((c.require(i), c.require(i + 1), _optional(c, i + 2)) for i in (0, 3))
    return _result(c, product(c, a, b), 6)


@converts("QLinearConv", since=10)
def _conv(c: Call) -> fx.Node:
    """x, weight by output channel, the result's scale and zero point, bias in whole numbers of both scales."""
    _refuse_channels_last(c)
    bias = _bias(c, 8, 1, 4) if c.given(8) else None
    return _result(c, _apply(c, "Conv", c.as_node(_operand(c, 0)), _operand(c, 3, axis=0), bias), 6)


@converts("ConvInteger", since=10)
def _conv_integer(c: Call) -> fx.Node:
    x = c.as_node(decoded(c, c.require(0), ONE, _optional(c, 2), 1))
    weight = decoded(c, c.require(1), ONE, _optional(c, 3), 0)
    return as_integers(c, _apply(c, "Conv", x, weight), "int32")


@converts("QGemm", domain=MICROSOFT)
def _gemm(c: Call) -> Any:
    """alpha A B + C, where C is in whole numbers of the product's scale; in codes where a scale for them is given."""
    weight_axis = 0 if c.attribute("transB", 0) else 1
    bias = _bias(c, 6, 1, 4, c.attribute("alpha", 1.0)) if c.given(6) else None
    result = _apply(c, "Gemm", c.as_node(_operand(c, 0)), _operand(c, 3, weight_axis), bias, beta=1.0)
    return _result(c, result, 7) if c.given(7) else result


def _bias(c: Call, i: int, x_scale: int, weight_scale: int, factor: float = 1.0) -> Any:
    """int32 at i, times both scales."""
    bias, scales = c.require(i), [c.require(j) for j in (x_scale, weight_scale)]
    if all(isinstance(v, Known) for v in (bias, *scales)):
        scale = scales[0].tensor.reshape(()) * scales[1].tensor.reshape(-1) * factor
        return Known(bias.tensor.float() * scale, name=bias.name)
    one, row = (c.as_node(s) for s in scales)
    scale = c.build.mul(c.reshape(one, ()), c.reshape(row, () if size(row) in ((), (1,)) else size(row)))
    result = c.build.mul(as_float(c, bias), scale)
    return result if factor == 1 else c.build.mul(result, factor)


def _refuse_channels_last(c: Call) -> None:
    if c.attribute("channels_last", 0):
        raise c.refuse(
            "has its channels last", fix="quantize the model without onnxruntime's layout optimizer"
        )


def _unary(name: str, operator: str, **options: Any) -> None:
    @converts(name, domain=MICROSOFT)
    def convert(c: Call) -> fx.Node:
        _refuse_channels_last(c)
        return _result(c, _apply(c, operator, c.as_node(_operand(c, 0)), **options), 3)


for _name in ("Sigmoid", "LeakyRelu", "GlobalAveragePool", "AveragePool"):
    _unary(f"QLinear{_name}", _name)
_unary("QLinearReduceMean", "ReduceMean", version=13)  # axes are an attribute


@converts("QLinearSoftmax", domain=MICROSOFT)
def _softmax(c: Call) -> fx.Node:
    x = c.as_node(_operand(c, 0))
    return _result(c, _apply(c, "Softmax", x, version=c.attribute("opset", 13)), 3)


def _binary(name: str, operator: str) -> None:
    @converts(name, domain=MICROSOFT)
    def convert(c: Call) -> fx.Node:
        return _result(c, _apply(c, operator, *(c.as_node(_operand(c, i)) for i in (0, 3))), 6)


_binary("QLinearAdd", "Add")
_binary("QLinearMul", "Mul")


@converts("QLinearWhere", domain=MICROSOFT)
def _where(c: Call) -> fx.Node:
    x, y = (c.as_node(_operand(c, i)) for i in (1, 4))
    return _result(c, _apply(c, "Where", c.require(0), x, y), 7)


@converts("QLinearConcat", domain=MICROSOFT)
def _concat(c: Call) -> fx.Node:
    """The result's scale and zero point, then codes, scale and zero point of every part."""
    parts = [c.as_node(_operand(c, i)) for i in range(2, len(c.inputs), 3)]
    return _result(c, _apply(c, "Concat", *parts), 0)


@converts("QAttention", domain=MICROSOFT)
def _attention(c: Call) -> Any:
    """Attention whose input and weight are codes: input, weight, bias, their scales, mask, their zero points, past."""
    x = c.require(0), c.require(3), _optional(c, 6)
    projected = product(c, x, (c.require(1), c.require(4), _optional(c, 7)))
    if c.given(8):
        raise c.refuse("keeps keys and values", fix="export the model without a cache")
    return attention(c, c.build.add(projected, c.node(2)), mask=5, added=None)


@converts("QEmbedLayerNormalization", domain=MICROSOFT)
def _embed_layer_norm(c: Call) -> tuple[Any, ...]:
    """Ids; word, position and segment tables, weight and bias in codes; mask; their five scales, five zero points."""
    tables = [
        decoded(c, c.require(i), c.require(i + 6), _optional(c, i + 11), 1) if c.given(i) else None
        for i in range(2, 7)
    ]
    return embed_layer_norm(c.on((c.require(0), _optional(c, 1), *tables, _optional(c, 7)), c.attributes))[:2]
