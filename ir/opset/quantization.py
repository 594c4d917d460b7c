"""Quantization: codes and what they stand for, and products of codes.

Between passes a quantized program is in QDQ form: ``linear(dequantize(codes of x), dequantize(codes of w), bias)``, so
every pass still sees a linear layer. The last pass, ``quantize.integers``, turns these into `integer_linear` or
`grouped_integer_linear`. Likewise ``embedding(ids, dequantize(codes of the table))``, of which it has the rows looked
up in codes and decoded then.

A value is ``(code - zero_point) * scale``. A scale is one number (shape ()), one per row (``[..., 1]``: per token),
one per index of ``axis`` ([N]), or one per ``group`` consecutive elements along the last dimension ([..., K / group]).
A zero point has one of these shapes too, or is a Python number.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from tersor.errors import ProgramError
from tersor.ir.dialect import Op, ops
from tersor.ir.dims import Dim
from tersor.ir.opset.rules import axis as axis_of
from tersor.ir.opset.rules import broadcast, require_dtype
from tersor.ir.value import DTYPES, Value

CODES = {"int8": (-128, 127), "uint8": (0, 255)}
"""Types of codes with their limits."""

SMALLEST_GROUP = 16
"""Activations whose scales belong to multiples of so many neighbours are multiplied as codes, since some targets'
instructions add up the products of as many. In other groups they are decoded first."""


def quantize(x, scale, zero_point=None, *, dtype: str, axis: int | None = None, group: int | None = None):
    """saturate(round(x * (1 / scale)) + zero_point), halves to even: x f32 [...] -> codes [...] of ``dtype``.

    Scale and zero point are f32, of the shapes that the module names. The reciprocal is rounded to f32 before the one
    multiplication, on every target alike, so codes are equal everywhere.
    """
    codes = torch.round(x * spread(1 / scale, x.shape, axis, group))
    if zero_point is not None:
        codes = codes + spread(zero_point, x.shape, axis, group)
    low, high = CODES[dtype]
    return codes.clamp(low, high).to(DTYPES[dtype])


def dequantize(codes, scale, zero_point=None, *, axis: int | None = None, group: int | None = None):
    """(codes - zero_point) * scale in f32; see the module for the shapes of scale and zero point (both f32)."""
    values = codes.to(scale.dtype)
    if zero_point is not None:
        values = values - spread(zero_point, codes.shape, axis, group)
    return values * spread(scale, codes.shape, axis, group)


def dynamic_scale(x, *, group: int | None = None):
    """max |x| / 127 over the last dimension, kept with size 1: the scale of symmetric 8-bit codes for every row.

    x f32 [..., K] -> [..., 1], or one for every ``group`` neighbours, [..., K / group]; zeros have the scale 1. With
    `quantize` this is per-token dynamic quantization (Yao et al. 2022, ZeroQuant).
    """
    parts = x if group is None else x.unflatten(-1, (-1, group))
    scale = parts.abs().amax(-1, keepdim=group is None) * (1 / 127)
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def integer_linear(codes, weight, bias=None):
    """codes @ weight.T + bias, exact in int32: codes uint8 [..., K], weight int8 [N, K], bias int32 [N] -> [..., N].

    Sums stay below 2^31 for K <= 66000 (K * 127 * 255) as long as the bias leaves room.
    """
    # whole numbers up to 2^53 are exact in float64, for which torch has a matrix product
    sums = torch.nn.functional.linear(
        codes.double(), weight.double(), None if bias is None else bias.double()
    )
    return sums.to(torch.int32)


def grouped_integer_linear(codes, weight, scale):
    """((codes - 128) * scale) @ weight.T, summed in int32 as far as a scale reaches, and then in f32.

    codes uint8 [..., K], weight int8 [N, K], scale f32 [..., K / group] (one for every ``group`` neighbours) -> f32
    [..., N].
    """
    parts = codes.unflatten(-1, (scale.shape[-1], -1)).double() - 128
    sums = torch.einsum("...gk,ngk->...gn", parts, weight.unflatten(1, (scale.shape[-1], -1)).double())
    return (sums.float() * scale.unsqueeze(-1)).sum(-2)


def spread(
    factor: torch.Tensor | float, shape: Any, axis: int | None, group: int | None
) -> torch.Tensor | float:
    """A scale or zero point in a form that broadcasts over a tensor of ``shape``."""
    if not isinstance(factor, torch.Tensor):
        return factor
    if group is not None:
        return factor.repeat_interleave(group, dim=-1)
    if axis is not None and factor.ndim:
        return factor.reshape([-1 if i == axis % len(shape) else 1 for i in range(len(shape))])
    return factor


def _check_factors(
    x: Value, factors: dict[str, Value | float | None], axis: int | None, group: int | None, what: str
) -> None:
    """Raises ProgramError unless scale and zero point are f32 and have one of the forms that the module names."""
    if axis is not None and group is not None:
        raise ProgramError(f"{what}: axis and group exclude each other")
    for name, factor in factors.items():
        if not isinstance(factor, Value):
            continue
        require_dtype("float32", **{name: factor})
        if group is not None:
            last = x.shape[-1] if x.rank else 1
            fits = isinstance(last, int) and last % group == 0
            fits = fits and factor.shape == (*x.shape[:-1], last // group)
        elif axis is not None and factor.rank:
            fits = factor.shape == (x.shape[axis_of(axis, x.rank)],)
        else:
            fits = factor.rank in (0, x.rank) and broadcast(x.shape, factor.shape) == x.shape
        if not fits:
            raise ProgramError(
                f"{what}: the {name} {factor} does not fit {x}",
                why=f"axis={axis}, group={group}",
                fix="a scale has shape (), [..., 1], [size of axis] or [..., K / group]",
            )


def _infer_quantize(
    x: Value, scale: Value, zero_point: Value | float | None = None, *, dtype: str,
    axis: int | None = None, group: int | None = None,
) -> Value:  # fmt: skip
    require_dtype("float32", x=x)
    if dtype not in CODES:
        raise ProgramError(f"quantize: {dtype!r} is no type of codes", fix=f"use one of {', '.join(CODES)}")
    _check_factors(x, {"scale": scale, "zero_point": zero_point}, axis, group, "quantize")
    return Value(dtype, x.shape)


def _infer_dequantize(
    codes: Value, scale: Value, zero_point: Value | float | None = None, *,
    axis: int | None = None, group: int | None = None,
) -> Value:  # fmt: skip
    if codes.dtype not in CODES:
        raise ProgramError(f"dequantize: {codes} are no codes", fix=f"use one of {', '.join(CODES)}")
    _check_factors(codes, {"scale": scale, "zero_point": zero_point}, axis, group, "dequantize")
    return Value("float32", codes.shape)


def _infer_dynamic_scale(x: Value, *, group: int | None = None) -> Value:
    require_dtype("float32", x=x)
    if not x.rank:
        raise ProgramError("dynamic_scale: a single number has no rows")
    if group is None:
        return Value("float32", (*x.shape[:-1], 1))
    if not isinstance(x.shape[-1], int) or group < 1 or x.shape[-1] % group:
        raise ProgramError(f"dynamic_scale: rows of {x} do not consist of groups of {group}")
    return Value("float32", (*x.shape[:-1], x.shape[-1] // group))


def _infer_integer_linear(codes: Value, weight: Value, bias: Value | None = None) -> Value:
    if (
        weight.rank != 2
        or not codes.rank
        or codes.shape[-1] != weight.shape[1]
        or (bias and bias.shape != weight.shape[:1])
    ):
        raise ProgramError(f"integer_linear: codes {codes}, weight {weight}, bias {bias} do not fit")
    require_dtype("uint8", codes=codes)
    require_dtype("int8", weight=weight)
    require_dtype("int32", bias=bias)
    return Value("int32", (*codes.shape[:-1], weight.shape[0]))


def _infer_grouped_integer_linear(codes: Value, weight: Value, scale: Value) -> Value:
    groups = scale.shape[-1] if scale.rank else 0
    fits = weight.rank == 2 and codes.rank and codes.shape[-1] == weight.shape[1]
    fits = fits and isinstance(groups, int) and groups > 0 and weight.shape[1] % groups == 0
    if not fits or scale.shape != (*codes.shape[:-1], groups):
        raise ProgramError(
            f"grouped_integer_linear: codes {codes}, weight {weight}, scale {scale} do not fit"
        )
    require_dtype("uint8", codes=codes)
    require_dtype("int8", weight=weight)
    require_dtype("float32", scale=scale)
    return Value("float32", (*codes.shape[:-1], weight.shape[0]))


def _grouped_integer_linear_macs(result: Value, codes: Value, weight: Value, scale: Value) -> int | Dim:
    return result.elements * weight.shape[1]


def _integer_linear_macs(result: Value, codes: Value, weight: Value, bias: Value | None = None) -> int | Dim:
    return result.elements * weight.shape[1]


def _factor(build: Any, factor: Any, x: Any, axis: int | None) -> Any:
    """A scale or zero point as an operand that broadcasts over x."""
    if not isinstance(factor, fx.Node):
        return factor
    value, shape = factor.meta["value"], x.meta["value"].shape
    if axis is None or not value.rank or axis % len(shape) == len(shape) - 1:
        return factor
    return build.reshape(factor, shape=tuple(d if i == axis % len(shape) else 1 for i, d in enumerate(shape)))


def _grouped(build: Any, x: Any, group: int) -> Any:
    shape = x.meta["value"].shape
    return build.reshape(x, shape=(*shape[:-1], shape[-1] // group, group))


def _decompose_quantize(
    build: Any, x: Any, scale: Any, zero_point: Any = None, *, dtype: str,
    axis: int | None = None, group: int | None = None,
) -> Any:  # fmt: skip
    """Element by element, so that it can share a kernel with its neighbours."""
    if group is not None:
        scale, zero_point = (_last(build, f) for f in (scale, zero_point))
        inner = _decompose_quantize(build, _grouped(build, x, group), scale, zero_point, dtype=dtype)
        return build.reshape(inner, shape=x.meta["value"].shape)
    codes = build.round(build.mul(x, build.reciprocal(_factor(build, scale, x, axis))))
    if zero_point is not None:
        codes = build.add(codes, _factor(build, zero_point, x, axis))
    return build.saturate(codes, dtype=dtype)


def _decompose_dequantize(
    build: Any, codes: Any, scale: Any, zero_point: Any = None, *,
    axis: int | None = None, group: int | None = None,
) -> Any:  # fmt: skip
    if group is not None:
        scale, zero_point = (_last(build, f) for f in (scale, zero_point))
        inner = _decompose_dequantize(build, _grouped(build, codes, group), scale, zero_point)
        return build.reshape(inner, shape=codes.meta["value"].shape)
    values = build.cast(codes, dtype="float32")
    if zero_point is not None:
        values = build.sub(values, _factor(build, zero_point, codes, axis))
    return build.mul(values, _factor(build, scale, codes, axis))


def _last(build: Any, factor: Any) -> Any:
    """A scale or zero point per group, for values with the groups as a dimension."""
    if not isinstance(factor, fx.Node):
        return factor
    return build.reshape(factor, shape=(*factor.meta["value"].shape, 1))


def _decompose_grouped_integer_linear(build: Any, codes: Any, weight: Any, scale: Any) -> Any:
    """In f32: of values, no longer of codes."""
    group = weight.meta["value"].shape[1] // scale.meta["value"].shape[-1]
    values = _decompose_dequantize(build, codes, scale, 128, group=group)
    return build.linear(values, build.cast(weight, dtype="float32"))


def _decompose_dynamic_scale(build: Any, x: Any, *, group: int | None = None) -> Any:
    parts = x if group is None else _grouped(build, x, group)
    scale = build.mul(build.amax(build.abs(parts), dims=(-1,), keepdim=group is None), 1 / 127)
    return build.where(build.eq(scale, 0.0), 1.0, scale)


ops.register(Op("quantize", quantize, _infer_quantize, decompose=_decompose_quantize))
ops.register(Op("dequantize", dequantize, _infer_dequantize, decompose=_decompose_dequantize))
ops.register(Op("dynamic_scale", dynamic_scale, _infer_dynamic_scale, decompose=_decompose_dynamic_scale))
ops.register(
    Op(
        "grouped_integer_linear",
        grouped_integer_linear,
        _infer_grouped_integer_linear,
        macs=_grouped_integer_linear_macs,
        decompose=_decompose_grouped_integer_linear,
    )
)
ops.register(Op("integer_linear", integer_linear, _infer_integer_linear, macs=_integer_linear_macs))
