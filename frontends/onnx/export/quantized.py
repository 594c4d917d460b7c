"""Codes as ONNX operators: QuantizeLinear and DequantizeLinear where these can say it, else arithmetic."""

from __future__ import annotations

import torch
from torch import fx

from tersor.frontends.onnx.export.table import Export, exports
from tersor.ir.opset.quantization import CODES


@exports("quantize")
def _quantize(e: Export) -> str:
    """One scale, or one along an axis; scales per row or group are multiplied out.

    QuantizeLinear divides by the scale where `quantize` multiplies by its reciprocal: where that falls on the other
    side of a half, codes differ by 1.
    """
    dtype = e.attribute("dtype")
    if in_standard_form(e.node):
        zero = _zero_point(e, dtype)
        return e.emit("QuantizeLinear", e.operand(0), e.operand(1), zero, axis=e.attribute("axis"))
    codes = e.emit("Round", e.emit("Mul", _in_groups(e, 0), e.emit("Reciprocal", _in_groups(e, 1))))
    if e.given(2):
        codes = e.emit("Add", codes, _in_groups(e, 2))
    low, high = (e.constant(float(limit), "float32") for limit in CODES[dtype])
    return _in_rows(e, e.cast(e.emit("Clip", codes, low, high), "float32", dtype))


@exports("dequantize")
def _dequantize(e: Export) -> str:
    """Codes that are stored transposed, for products, are decoded to a transposed weight."""
    name, axis = e.operand(0), e.attribute("axis")
    if in_standard_form(e.node):
        turned = name in e.writer.transposed
        axis = 1 - axis % 2 if turned and axis is not None else axis
        zero = _zero_point(e, e.value(0).dtype)
        result = e.emit("DequantizeLinear", name, e.operand(1), zero, axis=axis)
        if turned:
            e.writer.transposed.add(result)
        return result
    values = e.cast(_in_groups(e, 0), e.value(0).dtype, "float32")
    if e.given(2):
        values = e.emit("Sub", values, _in_groups(e, 2))
    return _in_rows(e, e.emit("Mul", values, _in_groups(e, 1)))


def in_standard_form(node: fx.Node) -> bool:
    """Whether ONNX has the form of the scale: one number, or one per index of an axis, with a like zero point."""
    scale, zero = (*node.args, None)[1:3]
    one = not scale.meta["value"].rank
    if node.kwargs.get("group") is not None or not (one or node.kwargs.get("axis") is not None):
        return False
    if not isinstance(zero, fx.Node):
        return zero is None or float(zero) == round(zero)
    return zero.meta["value"].rank == 0 or not one


def _in_groups(e: Export, index: int) -> str:
    """An operand with a dimension for groups that share a scale, and one for their members, where there are such."""
    group, operand = e.attribute("group"), e.argument(index)
    name = e.operand(index, None if index == 0 else "float32")
    if group is None or not isinstance(operand, fx.Node) or not e.value(index).rank:
        return name
    *lead, size = e.value(index).shape
    return e.reshape(name, (*lead, size), (*lead, size // group, group) if index == 0 else (*lead, size, 1))


def _in_rows(e: Export, name: str) -> str:
    """A result of operands in groups in its own shape."""
    group, (*lead, size) = e.attribute("group"), e.result.shape
    return name if group is None else e.reshape(name, (*lead, size // group, group), (*lead, size))


def _zero_point(e: Export, dtype: str) -> str:
    """The zero point in the type of the codes and of the scale's shape."""
    point, stored, shape = e.argument(2), e.parameter(2), e.value(1).shape
    if isinstance(point, fx.Node) and stored is None:
        zero = e.cast(e.operand(2), "float32", dtype)
        return zero if e.value(2).shape == shape else e.emit("Expand", zero, e.sizes(shape))
    known = stored if stored is not None else torch.tensor(float(point or 0))
    return e.constant(known.to(torch.int64).expand(shape), dtype)
