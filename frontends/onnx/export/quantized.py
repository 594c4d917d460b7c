"""Codes as ONNX operators: QuantizeLinear and DequantizeLinear where these can say it, else arithmetic."""

from __future__ import annotations

import torch
from torch import fx

from tersor.errors import UnsupportedOpError
from tersor.frontends.onnx.export.table import Export, exports
from tersor.ir.opset.quantization import CODES
from tersor.ir.verifier import describe


@exports("quantize")
def _quantize(e: Export) -> str:
    """One scale, or one along an axis; a scale per row is multiplied out.

    QuantizeLinear divides by the scale where `quantize` multiplies by its reciprocal: where that falls on the other
    side of a half, codes differ by 1.
    """
    dtype = e.attribute("dtype")
    if _in_standard_form(e):
        zero = _zero_point(e, dtype)
        return e.emit("QuantizeLinear", e.operand(0), e.operand(1), zero, axis=e.attribute("axis"))
    codes = e.emit("Round", e.emit("Mul", e.operand(0), e.emit("Reciprocal", e.operand(1))))
    if e.given(2):
        codes = e.emit("Add", codes, e.operand(2, "float32"))
    low, high = (e.constant(float(limit), "float32") for limit in CODES[dtype])
    return e.cast(e.emit("Clip", codes, low, high), "float32", dtype)


@exports("dequantize")
def _dequantize(e: Export) -> str:
    """Codes that are stored transposed, for products, are decoded to a transposed weight."""
    name, axis = e.operand(0), e.attribute("axis")
    if _in_standard_form(e):
        turned = name in e.writer.transposed
        axis = 1 - axis % 2 if turned and axis is not None else axis
        zero = _zero_point(e, e.value(0).dtype)
        result = e.emit("DequantizeLinear", name, e.operand(1), zero, axis=axis)
        if turned:
            e.writer.transposed.add(result)
        return result
    values = e.cast(name, e.value(0).dtype, "float32")
    if e.given(2):
        values = e.emit("Sub", values, e.operand(2, "float32"))
    return e.emit("Mul", values, e.operand(1))


def in_standard_form(node: fx.Node) -> bool:
    """Whether ONNX has the form of the scale: one number, or one per index of an axis, with a like zero point."""
    scale, zero = (*node.args, None)[1:3]
    one = not scale.meta["value"].rank
    if node.kwargs.get("group") is not None or not (one or node.kwargs.get("axis") is not None):
        return False
    if not isinstance(zero, fx.Node):
        return zero is None or float(zero) == round(zero)
    return zero.meta["value"].rank == 0 or not one


def _in_standard_form(e: Export) -> bool:
    if e.attribute("group") is not None:
        raise UnsupportedOpError(
            f"scales of {e.attribute('group')} elements each have no ONNX form here",
            where=describe(e.node),
            why="QuantizeLinear and DequantizeLinear have one scale, or one per channel",
            fix="quantize with a scale per row (group=None), or export the program before it is quantized",
        )
    return in_standard_form(e.node)


def _zero_point(e: Export, dtype: str) -> str:
    """The zero point in the type of the codes and of the scale's shape."""
    point, stored, shape = e.argument(2), e.parameter(2), e.value(1).shape
    if isinstance(point, fx.Node) and stored is None:
        zero = e.cast(e.operand(2), "float32", dtype)
        return zero if e.value(2).shape == shape else e.emit("Expand", zero, e.sizes(shape))
    known = stored if stored is not None else torch.tensor(float(point or 0))
    return e.constant(known.to(torch.int64).expand(shape), dtype)
