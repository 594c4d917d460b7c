"""The operations a Transformer is made of."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from tersor.errors import ProgramError
from tersor.ir.dialect import Op, ops
from tersor.ir.dims import Dim
from tersor.ir.opset.rules import broadcast, require_dtype, require_float, window_positions
from tersor.ir.value import Value


def linear(x, weight, bias=None):
    """x @ weight.T + bias: x [..., K], weight [N, K], bias [N] -> [..., N]."""
    return F.linear(x, weight, bias)


def _infer_linear(x: Value, weight: Value, bias: Value | None = None) -> Value:
    if weight.rank != 2 or x.shape[-1] != weight.shape[1] or (bias and bias.shape != weight.shape[:1]):
        raise ProgramError(f"linear: x {x}, weight {weight}, bias {bias} do not fit")
    require_dtype(x.dtype, weight=weight, bias=bias)
    return Value(x.dtype, (*x.shape[:-1], weight.shape[0]))


def matmul(x, y):
    """Matrix product of the last two dimensions, the leading ones broadcast: [..., M, K] @ [..., K, N]."""
    return torch.matmul(x, y)


def _infer_matmul(x: Value, y: Value) -> Value:
    if x.rank < 2 or y.rank < 2 or x.shape[-1] != y.shape[-2]:
        raise ProgramError(f"matmul: {x} and {y} do not fit")
    require_dtype(x.dtype, y=y)
    return Value(x.dtype, (*broadcast(x.shape[:-2], y.shape[:-2]), x.shape[-2], y.shape[-1]))


def layer_norm(x, weight=None, bias=None, *, eps: float = 1e-5):
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension (Ba et al. 2016)."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def _infer_norm(
    x: Value, weight: Value | None = None, bias: Value | None = None, *, eps: float = 0.0
) -> Value:
    require_float("a norm of", x)
    require_dtype(x.dtype, weight=weight, bias=bias)
    if any(v is not None and v.shape != x.shape[-1:] for v in (weight, bias)):
        raise ProgramError(f"norm: x {x}, weight {weight}, bias {bias} do not fit")
    return x


def rms_norm(x, weight=None, *, eps: float = 1e-6):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang & Sennrich 2019)."""
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def embedding(ids, table):
    """Rows of table [V, D] at ids [...] (int64) -> [..., D]."""
    return F.embedding(ids, table)


def _infer_embedding(ids: Value, table: Value) -> Value:
    require_dtype("int64", ids=ids)
    rows, width = table.shape
    return Value(table.dtype, (*ids.shape, width))


def rotary_embedding(x, cos, sin, *, heads: int, interleaved: bool = False):
    """Rotates pairs of channels of each head by position (Su et al. 2021).

    x [B, T, heads*D]; cos, sin [B or 1, T, R] with R <= D (the rest of the head passes unchanged). Pairs are
    (i, i + R/2), or (2i, 2i + 1) when interleaved; cos and sin hold the angle of channel i at position i.
    """
    batch, length, width = x.shape
    size, rotated = width // heads, cos.shape[-1]
    x = x.reshape(batch, length, heads, size)
    turned, rest = x[..., :rotated], x[..., rotated:]
    if interleaved:
        pairs = turned.unflatten(-1, (-1, 2))
        half = torch.stack((-pairs[..., 1], pairs[..., 0]), -1).flatten(-2)
    else:
        first, second = turned.chunk(2, -1)
        half = torch.cat((-second, first), -1)
    turned = turned * cos.unsqueeze(2) + half * sin.unsqueeze(2)
    return torch.cat((turned, rest), -1).reshape(batch, length, width)


def _infer_rotary_embedding(
    x: Value, cos: Value, sin: Value, *, heads: int, interleaved: bool = False
) -> Value:  # fmt: skip
    require_float("a rotation of", x)
    require_dtype(x.dtype, cos=cos, sin=sin)
    batch, length, width = x.shape
    rotated = cos.shape[-1]
    if (
        cos.shape != sin.shape
        or cos.shape[:2] not in ((batch, length), (1, length))
        or width % heads
        or rotated % 2
        or rotated > width // heads
    ):
        raise ProgramError(f"rotary_embedding: x {x} with {heads} heads, cos {cos}, sin {sin} do not fit")
    return x


def conv1d(x, weight, bias=None, *, stride: int = 1, padding: int = 0, dilation: int = 1, groups: int = 1):
    """x [B, C, T], weight [N, C/groups, k] -> [B, N, T']."""
    return F.conv1d(x, weight, bias, stride, padding, dilation, groups)


def conv2d(
    x, weight, bias=None, *, stride: tuple[int, int] = (1, 1), padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1), groups: int = 1,
):  # fmt: skip
    """x [B, C, H, W], weight [N, C/groups, kh, kw] -> [B, N, H', W']."""
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups)


def _check_conv(x: Value, weight: Value, bias: Value | None, spatial: int, groups: int) -> None:
    require_dtype(x.dtype, weight=weight, bias=bias)
    if (
        x.rank != spatial + 2
        or weight.rank != spatial + 2
        or x.shape[1] != weight.shape[1] * groups
        or weight.shape[0] % groups
        or (bias is not None and bias.shape != weight.shape[:1])
    ):
        raise ProgramError(f"convolution: x {x}, weight {weight}, bias {bias}, {groups} groups do not fit")


def _infer_conv1d(x: Value, weight: Value, bias: Value | None = None, *, stride: int = 1, padding: int = 0,
                  dilation: int = 1, groups: int = 1) -> Value:  # fmt: skip
    _check_conv(x, weight, bias, 1, groups)
    length = window_positions(x.shape[2], weight.shape[2], stride, padding, dilation)
    return Value(x.dtype, (x.shape[0], weight.shape[0], length))


def _infer_conv2d(x: Value, weight: Value, bias: Value | None = None, *, stride=(1, 1), padding=(0, 0),
                  dilation=(1, 1), groups: int = 1) -> Value:  # fmt: skip
    _check_conv(x, weight, bias, 2, groups)
    sizes = [
        window_positions(x.shape[2 + i], weight.shape[2 + i], stride[i], padding[i], dilation[i])
        for i in range(2)
    ]
    return Value(x.dtype, (x.shape[0], weight.shape[0], *sizes))


def _weight_macs(result: Value, x: Value, weight: Value, *_: Any, **__: Any) -> int | Dim:
    # each output element meets one row of the weight
    per_output: int | Dim = 1
    for size in weight.shape[1:]:
        per_output = per_output * size
    return result.elements * per_output


ops.register(Op("linear", linear, _infer_linear, macs=_weight_macs))
ops.register(Op("matmul", matmul, _infer_matmul, macs=lambda result, x, y: result.elements * x.shape[-1]))
ops.register(Op("layer_norm", layer_norm, _infer_norm))
ops.register(Op("rms_norm", rms_norm, _infer_norm))
ops.register(
    Op(
        "embedding",
        embedding,
        _infer_embedding,
        bytes=lambda result, ids, table: ids.bytes + 2 * result.bytes,
    )
)
ops.register(Op("rotary_embedding", rotary_embedding, _infer_rotary_embedding))
ops.register(Op("conv1d", conv1d, _infer_conv1d, macs=_weight_macs))
ops.register(Op("conv2d", conv2d, _infer_conv2d, macs=_weight_macs))
