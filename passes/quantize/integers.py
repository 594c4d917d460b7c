"""Linear layers between decoded operands become integer products."""

from __future__ import annotations

import torch
from torch import fx

from tersor.ir import Builder, Function, Program
from tersor.ir.matching import is_call
from tersor.passes.base import Lossy, Pass, PassResult
from tersor.passes.context import Context
from tersor.passes.quantize.places import Decoded, bias_of, decoded, drop_unread, number
from tersor.passes.registry import register

SAFE_SUM = 2**31 - 1
"""What accumulators hold."""


@register("quantize.integers")
class IntegerProducts(Pass):
    """decode(a) decode(W)^T + b  ->  (a C^T + k) m: the product in whole numbers, then one multiplication.

    Before:  %x = dequantize(%a, @sx, 117);  %w = dequantize(@w.codes, @w.scale, axis=0);  %y = linear(%x, %w, @b)
    After:   %i = integer_linear(%a, @w.codes, @k);  %y = mul(cast(%i, float32), @m)
             m = sx w.scale;  k = round(b / m) - 117 sum(w.codes)

    With a scale per token the sums are multiplied by both scales, and the bias is added in float32:
             %y = add(mul(mul(cast(%i), @w.scale), %s), @b)

    int8 activations become uint8 first, 128 more, with a zero point 128 more: exactly the same values.

    Legal when the activations are in codes with one scale (or one per token) and a zero point that is a number, the
    weights int8 with a scale per row and no zero point, and no sum can leave int32.

    Source: Jacob et al. 2018, section 2.2. The result differs from the decoded layer's by the rounding of f32 sums and
    of the bias (at most half of m).
    """

    numerics = Lossy()
    stage = "requantize"
    acts_on = ("linear",)

    def run(self, program: Program, context: Context) -> PassResult:
        result = PassResult()
        for function in program.functions.values():
            for node in function.calls("quantize"):
                _make_unsigned(function, node, self.name)
        for function, linear in self.select(program):
            x, weight = decoded(linear.args[0]), decoded(linear.args[1])
            if x is None and weight is None:
                result.skip(linear, "it is not quantized")
                continue
            reason = _unfit(function, linear, x, weight)
            if reason:
                result.skip(linear, reason)
                continue
            result.change(linear, "sums in int32")
            function.replace(linear, _integer(function, linear, x, weight, self.name))
        drop_unread(program)
        return result


def _make_unsigned(function: Function, encoding: fx.Node, made_by: str) -> None:
    """int8 codes as uint8 ones, 128 more, where they are made to be decoded and nothing else; values are the same."""
    zeros = {node: number(function, (*node.args, None)[2]) for node in (encoding, *encoding.users)}
    if (
        encoding.kwargs["dtype"] != "int8"
        or None in zeros.values()
        or not all(is_call(user, "dequantize") for user in encoding.users)
    ):
        return
    build = function.builder(before=encoding, made_by=made_by)
    form = {name: value for name, value in encoding.kwargs.items() if name != "dtype"}
    x, scale = encoding.args[:2]
    unsigned = build.quantize(x, scale, zeros[encoding] + 128, dtype="uint8", **form)
    for user in list(encoding.users):
        user.args = (*user.args[:2], zeros[user] + 128)
    function.replace(encoding, unsigned)


def _unfit(function: Function, linear: fx.Node, x: Decoded | None, weight: Decoded | None) -> str | None:
    """Why a layer's product cannot be one of integers; None when it can."""
    if x is None:
        return "its input is not in codes"
    if weight is None:
        return "its weights are not in codes"
    codes, scale = function.parameter(weight.codes), function.parameter(weight.scale)
    if codes is None or scale is None or codes.dtype != torch.int8:
        return "its weights are not stored int8 codes"
    if weight.group is not None or weight.axis not in (None, 0) or scale.ndim > 1:
        return "its weights do not have one scale per row"
    points = function.parameter(weight.zero)
    if bool(points.any()) if points is not None else number(function, weight.zero) != 0.0:
        return "its weights have a zero point"
    if x.codes.meta["value"].dtype != "uint8":
        return f"its input's codes are {x.codes.meta['value'].dtype}, not uint8"
    if x.axis is not None or x.group is not None:
        return "its input has a scale per channel"
    zero = number(function, x.zero)
    if zero is None or zero != round(zero):
        return "its input's zero point is not one whole number"
    if bias_of(linear) is not None and function.parameter(bias_of(linear)) is None:
        return "its bias is computed"
    largest = 255 * codes.to(torch.int64).abs().sum(1).max()
    if 2 * int(largest) > SAFE_SUM:
        return f"sums over {codes.shape[1]} inputs could leave int32"
    return None


def _integer(function: Function, linear: fx.Node, x: Decoded, weight: Decoded, made_by: str) -> fx.Node:
    """The layer in whole numbers, in front of the linear one."""
    build = function.builder(before=linear, made_by=made_by)
    codes, scale = function.parameter(weight.codes), function.parameter(weight.scale)
    bias, name = bias_of(linear), weight.codes.target.removesuffix(".codes")
    correction = -int(number(function, x.zero)) * codes.to(torch.int64).sum(1)
    one = function.parameter(x.scale)
    if one is not None and one.numel() == 1:
        multiplier = (one.double().reshape(()) * scale.double()).float().expand(codes.shape[0])
        start = correction
        if bias is not None:
            wanted = torch.round(function.parameter(bias).double() / multiplier.double())
            start = correction + wanted.to(torch.int64) if wanted.abs().max() < SAFE_SUM // 2 else correction
            if start is not correction:
                bias = None
        sums = _sums(build, linear, x, weight, start)
        y = build.mul(sums, build.parameter(f"{name}.multiplier", multiplier))
    else:
        sums = _sums(build, linear, x, weight, correction)
        y = build.mul(build.mul(sums, weight.scale), x.scale)
    return y if bias is None else build.add(y, bias)


def _sums(build: Builder, linear: fx.Node, x: Decoded, weight: Decoded, start: torch.Tensor) -> fx.Node:
    """Codes times codes, from ``start`` on, as f32; the product takes the layer's site."""
    name = weight.codes.target.removesuffix(".codes")
    start = build.parameter(f"{name}.start", start.to(torch.int32))
    product = build.emit("integer_linear", x.codes, weight.codes, start, site=linear.meta.pop("site", None))
    return build.cast(product, dtype="float32")
