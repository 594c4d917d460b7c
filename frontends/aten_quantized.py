"""Operators of graphs that PT2E made (``quantized_decomposed``): codes, and what they stand for.

The library that they belong to is not torch's core: whoever has such a graph has loaded it (from torch or torchao), so
its converters are entered when a capture begins, and only if it is there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from tersor.errors import CaptureError
from tersor.frontends.aten import Context, converts
from tersor.ir.opset.quantization import CODES
from tersor.ir.value import DTYPE_NAMES


def enter_converters() -> None:
    """Enters the converters of the library where it is loaded."""
    library = torch.ops.quantized_decomposed
    for name, converter in _CONVERTERS.items():
        if hasattr(library, name):
            packet = getattr(library, name)
            converts(*(getattr(packet, o) for o in packet.overloads() if o in ("default", "tensor")))(
                converter
            )


def _codes(dtype: torch.dtype) -> str:
    name = DTYPE_NAMES.get(dtype, str(dtype))
    if name not in CODES:
        raise CaptureError(
            f"the model is quantized to {name}",
            why=f"codes are {' or '.join(CODES)}",
            fix="quantize it to 8 bits",
        )
    return name


def _encoded(
    c: Context, x: fx.Node, scale: Any, zero: Any, low: int, high: int, dtype: torch.dtype, **form: int
) -> fx.Node:
    """quantize; a range narrower than the type's is one of x first, whose ends are whole steps."""
    name = _codes(dtype)
    if (low, high) != CODES[name]:
        if isinstance(scale, fx.Node) or isinstance(zero, fx.Node):
            raise CaptureError(
                f"codes are kept between {low} and {high} by a scale that is no number",
                fix=f"quantize to all of {name}, or with one number as scale",
            )
        x = c.build.minimum(c.build.maximum(x, (low - zero) * scale), (high - zero) * scale)
    return c.build.quantize(x, _scale(c, scale), _zero(c, zero), dtype=name, **form)


def _scale(c: Context, scale: Any) -> fx.Node:
    """As a float32 value, () where it is one number."""
    if not isinstance(scale, fx.Node):
        return c.build.parameter("quantized.scale", torch.tensor(float(scale)))
    scale = c.cast(scale, "float32")
    return c.build.reshape(scale, shape=()) if scale.meta["value"].shape == (1,) else scale


def _zero(c: Context, zero: Any) -> Any:
    return _scale(c, zero) if isinstance(zero, fx.Node) else float(zero)


def _quantize_per_tensor(
    c: Context, x: fx.Node, scale: Any, zero: Any, low: int, high: int, dtype: torch.dtype
) -> fx.Node:
    return _encoded(c, x, scale, zero, low, high, dtype)


def _quantize_per_channel(
    c: Context, x: fx.Node, scale: fx.Node, zero: fx.Node, axis: int, low: int, high: int, dtype: torch.dtype
) -> fx.Node:
    return _encoded(c, x, scale, zero, low, high, dtype, axis=axis)


def _dequantize_per_tensor(
    c: Context,
    codes: fx.Node,
    scale: Any,
    zero: Any,
    low: int,
    high: int,
    dtype: torch.dtype,
    *,
    out_dtype: Any = None,
) -> fx.Node:
    _codes(dtype)
    return c.cast(c.build.dequantize(codes, _scale(c, scale), _zero(c, zero)), c.dtype)


def _dequantize_per_channel(
    c: Context, codes: fx.Node, scale: fx.Node, zero: fx.Node | None, axis: int, low: int, high: int,
    dtype: torch.dtype, *, out_dtype: Any = None,
) -> fx.Node:  # fmt: skip
    _codes(dtype)
    points = () if zero is None else (_zero(c, zero),)
    return c.cast(c.build.dequantize(codes, _scale(c, scale), *points, axis=axis), c.dtype)


_CONVERTERS = {
    "quantize_per_tensor": _quantize_per_tensor,
    "quantize_per_channel": _quantize_per_channel,
    "dequantize_per_tensor": _dequantize_per_tensor,
    "dequantize_per_channel": _dequantize_per_channel,
}
