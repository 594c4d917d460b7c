"""Quantized ONNX operators: codes and what they stand for, products of codes.

QuantizeLinear and DequantizeLinear of 8-bit codes become `quantize` and `dequantize`; stored weights are decoded first
and get their codes back afterwards (`codes`). A product of integers is that of codes decoded with the scale 1, until
the scales that follow it are found (`products`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from tersor.frontends.onnx.codes import Encoded, name_of
from tersor.frontends.onnx.elementwise import WHOLE
from tersor.frontends.onnx.reader import dtype_name
from tersor.frontends.onnx.table import MICROSOFT, Call, converts, dtype, size
from tersor.frontends.onnx.values import Known
from tersor.ir.opset.quantization import CODES
from tersor.ir.value import DTYPES

_LIMITS = {"uint8": (0, 255), "int8": (-128, 127), "int16": (-32768, 32767)}


def as_integers(c: Call, x: fx.Node, name: str) -> fx.Node:
    """A float32 value of whole numbers within the type's range, as that type."""
    result = c.build.cast(x, dtype=name)
    result.meta[WHOLE] = True
    return result


def as_float(c: Call, x: fx.Node | Known) -> fx.Node:
    """Integers as float32, without the detour where they are such a cast."""
    if isinstance(x, Known):
        return c.as_node(Known(x.tensor.float(), name=x.name))
    return x.args[0] if x.meta.get(WHOLE) else c.cast(x, "float32")


@converts("DequantizeLinear", since=10)
@converts("DequantizeLinear", domain=MICROSOFT)
def _dequantize(c: Call) -> Any:
    """(x - zero point) * scale; a stored x is dequantized here and keeps its name."""
    zero = c.inputs[2] if c.given(2) else None
    return decoded(c, c.require(0), c.require(1), zero, c.attribute("axis", 1), c.attribute("block_size", 0))


def decoded(
    c: Call,
    x: fx.Node | Known,
    scale: fx.Node | Known,
    zero: fx.Node | Known | None,
    axis: int,
    block: int = 0,
) -> Any:
    if all(y is None or isinstance(y, Known) and y.tensor is not None for y in (x, scale, zero)):
        return _decoded_now(x, scale.tensor, None if zero is None else zero.tensor, axis, block)
    if block:
        raise c.refuse(
            "dequantizes computed values block by block",
            why="computed codes have a scale, or one per channel",
        )
    if dtype(x) in CODES:
        operands, form = _factors(c, x, scale, zero, axis)
        return c.cast(c.build.dequantize(c.as_node(x), *operands, **form), dtype(scale))
    result = as_float(c, x)
    if zero is not None and not _is_zero(zero):
        result = c.build.sub(result, _factor(c, as_float(c, zero), result, axis))
    return c.build.mul(result, _factor(c, c.as_node(scale), result, axis))


def _decoded_now(x: Known, scale: torch.Tensor, zero: torch.Tensor | None, axis: int, block: int) -> Known:
    shape = x.tensor.shape
    centred, spread = x.tensor.float(), _along(shape, scale, axis, block).float()
    if zero is not None:
        centred = centred - _along(shape, zero, axis, block).float()
    values, encoded = (centred * spread).to(scale.dtype), None
    name = name_of(x.name)
    if x.name and len(shape) > 1 and not block and x.dtype in CODES and scale.dtype == torch.float32:
        factors = [
            None if f is None else f.float().reshape(() if f.numel() == 1 else -1) for f in (scale, zero)
        ]
        one = all(f is None or not f.ndim for f in factors)
        axis = 0 if one and len(shape) > 2 else axis % len(shape)
        if len(shape) == 2 or axis == 0:
            encoded = Encoded(name, x.tensor.flatten(1), *factors, axis)
    return Known(values, name=name, encoded=encoded)


def _factors(
    c: Call, x: fx.Node | Known, scale: fx.Node | Known, zero: fx.Node | Known | None, axis: int
) -> tuple[list[Any], dict[str, int]]:
    """Scale and zero point as operands of `quantize` and `dequantize`, with the attribute that says how they lie."""
    one = size(scale) in ((), (1,))
    form = {} if one else {"axis": axis % len(size(x))}
    operands: list[Any] = [c.cast(c.reshape(c.as_node(scale), () if one else size(scale)), "float32")]
    if zero is None or _is_zero(zero):
        return operands, form
    if isinstance(zero, Known) and zero.is_number:
        return [*operands, float(zero.number())], form
    point = as_float(c, zero)
    return [*operands, c.reshape(point, () if size(point) == (1,) else size(point))], form


def _is_zero(zero: fx.Node | Known) -> bool:
    return isinstance(zero, Known) and not zero.tensor.any()


def _along(shape: torch.Size, factor: torch.Tensor, axis: int, block: int) -> torch.Tensor:
    """Scale or zero point in a form that broadcasts over x: one number, one per channel, or one per block."""
    if factor.numel() == 1:
        return factor.reshape(())
    if block:
        return factor.repeat_interleave(block, dim=axis).narrow(axis, 0, shape[axis])
    return factor.reshape([-1 if i == axis % len(shape) else 1 for i in range(len(shape))])


def _factor(c: Call, factor: fx.Node, x: fx.Node, axis: int) -> Any:
    if size(factor) in ((), (1,)):
        return c.reshape(factor, ())
    return c.reshape(factor, [d if i == axis % len(size(x)) else 1 for i, d in enumerate(size(x))])


@converts("QuantizeLinear", since=10)
@converts("QuantizeLinear", domain=MICROSOFT)
def _quantize(c: Call) -> Any:
    """saturate(round(x / scale) + zero point); 8-bit codes by the reciprocal of the scale (`quantize`)."""
    code = c.attribute("output_dtype", 0)
    name = dtype(c.require(2)) if c.given(2) else dtype_name(code) if code else "uint8"
    if name not in _LIMITS or c.attribute("block_size", 0):
        raise c.refuse(f"makes {name}, or works in blocks", why="8 and 16 bits by channel are known")
    return encoded(
        c, c.require(0), c.require(1), c.inputs[2] if c.given(2) else None, c.attribute("axis", 1), name
    )


def encoded(
    c: Call, x: fx.Node | Known, scale: fx.Node | Known, zero: fx.Node | Known | None, axis: int, name: str
) -> Any:
    low, high = _LIMITS[name]
    if all(y is None or isinstance(y, Known) and y.tensor is not None for y in (x, scale, zero)):
        shape = x.tensor.shape
        codes = torch.round(x.tensor.float() / _along(shape, scale.tensor, axis, 0).float())
        if zero is not None:
            codes = codes + _along(shape, zero.tensor, axis, 0).float()
        return Known(codes.clamp(low, high).to(DTYPES[name]), name=x.name)
    x = c.as_node(x)
    if name in CODES:
        operands, form = _factors(c, x, scale, zero, axis)
        return c.build.quantize(c.cast(x, "float32"), *operands, dtype=name, **form)
    codes = c.build.round(c.build.div(x, _factor(c, c.as_node(scale), x, axis)))
    if zero is not None and not _is_zero(zero):
        codes = c.build.add(codes, _factor(c, as_float(c, zero), x, axis))
    return as_integers(c, _clamped(c, codes, low, high), name)


def _clamped(c: Call, x: fx.Node, low: int, high: int) -> fx.Node:
    return c.build.minimum(c.build.maximum(x, float(low)), float(high))


@converts("DynamicQuantizeLinear", since=11)
def _dynamic_quantize(c: Call) -> tuple[fx.Node, ...]:
    codes, scale, zero = _dynamic_codes(c, c.node(0))
    return codes, scale, as_integers(c, zero, "uint8")


def _dynamic_codes(c: Call, x: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node]:
    """uint8 codes, their scale and zero point, which is float32 here, by the range of the whole tensor and 0."""
    axes = tuple(range(len(size(x))))
    high = c.build.maximum(c.build.amax(x, dims=axes), 0.0)
    low = c.build.minimum(c.build.amin(x, dims=axes), 0.0)
    scale = c.build.div(c.build.sub(high, low), 255.0)
    scale = c.build.where(c.build.eq(scale, 0.0), 1.0, scale)
    zero = c.build.round(_clamped(c, c.build.div(c.build.neg(low), scale), 0, 255))
    return c.build.quantize(x, scale, zero, dtype="uint8"), scale, zero


@converts("MatMulInteger", since=10)
def _matmul_integer(c: Call) -> fx.Node:
    """A product without zero points is one already; others are those of decoded codes."""
    a, b = c.require(0), c.require(1)
    zeros = [c.inputs[i] if c.given(i) and not _is_zero(c.require(i)) else None for i in (2, 3)]
    plain = zeros == [None, None] and isinstance(a, fx.Node) and isinstance(b, Known)
    if plain and (dtype(a), dtype(b)) == ("uint8", "int8") and len(size(b)) == 2:
        return c.build.integer_linear(a, c.as_node(Known(b.tensor.t().contiguous(), name=b.name)))
    return as_integers(c, product(c, (a, ONE, zeros[0]), (b, ONE, zeros[1])), "int32")


@converts("MatMulIntegerToFloat", domain=MICROSOFT)
def _matmul_integer_to_float(c: Call) -> fx.Node:
    """A, B, scale of A, scale of B, zero points, bias."""
    zeros = [c.inputs[i] if c.given(i) else None for i in (4, 5)]
    result = product(c, *((c.require(i), c.require(2 + i), zeros[i]) for i in (0, 1)))
    return c.build.add(result, c.node(6)) if c.given(6) else result


@converts("DynamicQuantizeMatMul", domain=MICROSOFT)
def _dynamic_quantize_matmul(c: Call) -> fx.Node:
    """A is quantized by its range; B, its scale, its zero point, bias."""
    weight = c.require(1), c.require(2), c.inputs[3] if c.given(3) else None
    result = product(c, _dynamic_codes(c, c.node(0)), weight)
    return c.build.add(result, c.node(4)) if c.given(4) else result


ONE = Known(torch.ones(()))
"""The scale of codes that stand for themselves."""

Coded = tuple[Any, Any, Any]
"""Codes, scale and zero point (None: 0)."""


def product(c: Call, a: Coded, b: Coded) -> fx.Node:
    """Decoded a times decoded b; what a has per channel is per row, what b has is per column."""
    return c.build.matmul(c.as_node(decoded(c, *a, axis=-2)), c.as_node(decoded(c, *b, axis=-1)))
