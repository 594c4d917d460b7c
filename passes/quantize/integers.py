"""Layers and attentions of decoded operands become integer products, and tables are looked up in codes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from tersor.ir import Builder, Function, Program
from tersor.ir.matching import is_call
from tersor.ir.structure import ROLES
from tersor.passes.base import Lossy, Pass, PassResult
from tersor.passes.context import Context
from tersor.passes.quantize import convolutions
from tersor.passes.quantize.places import (
    ACTIVATION_ZERO,
    Decoded,
    bias_of,
    decoded,
    drop_unread,
    number,
)
from tersor.passes.registry import register

CONVOLUTIONS = ("conv1d", "conv2d")

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

    With scales of groups in every token, each group's sum is multiplied by its scale before they are added up:
             %y = add(mul(grouped_integer_linear(%a, @w.codes, %s), @w.scale), @b)

    int8 activations become uint8 first, 128 more, with a zero point 128 more: exactly the same values.

    Factors of columns in front of codes that only such products read become part of the scale, where they are positive:
             quantize(mul(x, @f), @s, z)  ->  quantize(x, @s / f, z, axis=-1)

    A zero point p that is found while the model runs, and zero points q of the weights, are taken off the sums:
             %i = integer_linear(%a, @w.codes) - p (sum(w.codes) - K q) - q integer_linear(%a, @ones)

    Of a table in codes the rows that are read are decoded, which is exact:
    Before:  %t = dequantize(@t.codes, @t.scale, axis=0);  %y = embedding(%ids, %t)
    After:   %y = dequantize(embedding(%ids, @t.codes), index_select(@t.scales, %ids, dim=0))

    Legal when the activations are in codes with a scale and a zero point, or one of each per token, or symmetric ones
    with scales of groups, the weights int8 with a scale and a whole zero point per row (of groups: zero), or one for
    all, and no sum can leave int32.

    Attention whose products are in uint8 reads the codes, and the scales of its heads:
             %a = attention(dequantize(%q, @sq, 128, axis=2), ...)  ->  %a = integer_attention(%q, %k, %v, @sq sk, @sv)

    Source: Jacob et al. 2018, section 2.2. The result differs from the decoded layer's by the rounding of f32 sums and
    of the bias (at most half of m).
    """

    numerics = Lossy()
    stage = "requantize"
    acts_on = ("linear", "attention", "embedding", *CONVOLUTIONS)

    def run(self, program: Program, context: Context) -> PassResult:
        result = PassResult()
        self._look_up(program, result)
        for function in program.functions.values():
            for node in function.calls("quantize"):
                _make_unsigned(function, node, self.name)
        self._as_layers(program, result)
        products = {function: _Products(function, self.name) for function in program.functions.values()}
        for function, linear in self.select(program, "linear"):
            x, weight = decoded(linear.args[0]), decoded(linear.args[1])
            if x is None and weight is None:
                result.skip(linear, "it is not quantized")
                continue
            reason = _unfit(function, linear, x, weight)
            if reason:
                result.skip(linear, reason)
                continue
            result.change(linear, "sums in int32")
            make = products[function].integer if x.group is None else products[function].grouped
            function.replace(linear, make(linear, x, weight))
        for function, attention in self.select(program, "attention"):
            if attention.kwargs.get("products") != "uint8":
                continue  # its operands are no codes
            if reason := _unfit_attention(function, attention):
                result.skip(attention, reason)
                continue
            result.change(attention, "sums in int32")
            function.replace(attention, _integer_attention(function, attention, self.name))
        for function in program.functions.values():
            for node in function.calls("quantize"):
                _join_factor(function, node, self.name)
        drop_unread(program)
        return result

    def _as_layers(self, program: Program, result: PassResult) -> None:
        """Convolutions whose products can be integers become linear layers over their windows."""
        for function, conv in self.select(program, *CONVOLUTIONS):
            x, weight = decoded(conv.args[0]), decoded(conv.args[1])
            if reason := convolutions.unfit(function, conv) or _unfit(function, conv, x, weight):
                result.skip(conv, reason)
            else:
                convolutions.to_linear(function, conv, self.name)

    def _look_up(self, program: Program, result: PassResult) -> None:
        """Embeddings of tables that are decoded whole read codes, and decode what they have read."""
        columns: dict[str, str] = {}
        for function, embedding in self.select(program, "embedding"):
            table = decoded(embedding.args[1])
            if table is None:
                result.skip(embedding, "it is not quantized")
                continue
            if reason := _unfit_table(function, table):
                result.skip(embedding, reason)
                continue
            build = function.builder(before=embedding, made_by=self.name)
            ids = embedding.args[0]
            zero = number(function, table.zero)
            factors = [table.scale, *([table.zero if zero is None else zero] if zero != 0 else [])]
            factors = [_of_rows(build, ids, f, columns) if _is_per_row(f, table) else f for f in factors]
            result.change(embedding, "rows are looked up in codes")
            rows = build.emit("embedding", ids, table.codes, site=embedding.meta.pop("site", None))
            form = {"group": table.group} if table.group else {"axis": -1} if (table.axis or 0) % 2 else {}
            function.replace(embedding, build.dequantize(rows, *factors, **form))


def _unfit_table(function: Function, table: Decoded) -> str | None:
    """Why rows of a table cannot be looked up before they are decoded; None when they can."""
    stored = [x for x in (table.codes, table.scale, table.zero) if isinstance(x, fx.Node)]
    if any(function.parameter(x) is None for x in stored):
        return "its codes and their scales are not stored"
    rows = table.codes.meta["value"].shape[0]
    if any(x.meta["value"].rank == 2 and x.meta["value"].shape[0] != rows for x in stored):
        return "its scales are laid out across its rows"
    return None


def _is_per_row(factor: fx.Node | float, table: Decoded) -> bool:
    """Whether each row of a table has its own scale or zero point (or some), not one for all or one per column."""
    rank = factor.meta["value"].rank if isinstance(factor, fx.Node) else 0
    return rank == 2 or rank == 1 and table.axis % 2 == 0


def _of_rows(build: Builder, ids: fx.Node, factor: fx.Node, columns: dict[str, str]) -> fx.Node:
    """The scales or zero points of the rows at ``ids``: [rows] as [rows, 1], stored once, or groups as they are."""
    function = build.function
    if factor.meta["value"].rank == 1:
        if factor.target not in columns:
            values = function.parameter(factor)[:, None]
            columns[factor.target] = function.parameters.add(f"{factor.target}s", values)
        factor = build.read(columns[factor.target])
    return build.index_select(factor, ids, dim=0)


def _make_unsigned(function: Function, encoding: fx.Node, made_by: str) -> None:
    """int8 codes as uint8 ones, 128 more, where they are made to be decoded and nothing else; values are the same."""
    if encoding.kwargs["dtype"] != "int8" or not all(is_call(u, "dequantize") for u in encoding.users):
        return
    zeros = {node: number(function, (*node.args, None)[2]) for node in (encoding, *encoding.users)}
    if None in zeros.values():
        return
    build = function.builder(before=encoding, made_by=made_by)
    form = {name: value for name, value in encoding.kwargs.items() if name != "dtype"}
    x, scale = encoding.args[:2]
    unsigned = build.quantize(x, scale, zeros[encoding] + 128, dtype="uint8", **form)
    for user in list(encoding.users):
        user.args = (*user.args[:2], zeros[user] + 128)
    function.replace(encoding, unsigned)


def _join_factor(function: Function, encoding: fx.Node, made_by: str) -> None:
    """``quantize(x * f, s)`` as ``quantize(x, s / f)`` for a stored factor per column, where the scale, one or one per
    column, is not asked for again."""
    product, scale, *zero = encoding.args
    step = function.parameter(scale)
    if step is None or not is_call(product, "mul") or len(product.users) > 1:
        return
    axis, last = encoding.kwargs.get("axis"), product.meta["value"].rank - 1
    if step.ndim and (step.ndim > 1 or axis is None or axis % (last + 1) != last):
        return
    if not all(is_call(user, "integer_linear", "integer_attention") for user in encoding.users):
        return
    for x, factor in (product.args, reversed(product.args)):
        columns = function.parameter(factor)
        if columns is None or columns.ndim != 1 or x.meta["value"] != product.meta["value"]:
            continue
        steps = (step.double() / columns.double()).float()
        if steps.isfinite().all() and (steps > 0).all():
            build = function.builder(before=encoding, made_by=made_by)
            joined = build.parameter(f"{factor.target}.scale", steps)
            codes = build.quantize(x, joined, *zero, dtype=encoding.kwargs["dtype"], axis=-1)
            function.replace(encoding, codes)
        return


def _unfit(function: Function, linear: fx.Node, x: Decoded | None, weight: Decoded | None) -> str | None:
    """Why the product of a layer or convolution cannot be one of integers; None when it can."""
    if x is None:
        return "its input is not in codes"
    if weight is None:
        return "its weights are not in codes"
    codes, scale = function.parameter(weight.codes), function.parameter(weight.scale)
    if codes is None or scale is None or codes.dtype != torch.int8:
        return "its weights are not stored int8 codes"
    if weight.group is not None or weight.axis not in (None, 0) or scale.ndim > 1:
        return "its weights do not have one scale per row"
    points = _points(function, weight)
    if points is None or not torch.equal(points, points.round()):
        return "its weights' zero point is not a stored whole number, or one per row"
    if x.codes.meta["value"].dtype != "uint8":
        return f"its input's codes are {x.codes.meta['value'].dtype}, not uint8"
    if x.axis is not None:
        return "its input has a scale per channel"
    if x.group is not None:
        if _is_computed(function, x.zero) or number(function, x.zero) != ACTIVATION_ZERO:
            return f"its input has groups of codes with another zero point than {ACTIVATION_ZERO}"
        if points.any():
            return "its input has scales of groups, and its weights zero points"
    elif _is_computed(function, x.zero):
        if x.zero.meta["value"].shape not in ((), (*x.codes.meta["value"].shape[:-1], 1)):
            return "its input has zero points that are neither one nor one per token"
    elif (zero := number(function, x.zero)) is None or zero != round(zero):
        return "its input's zero point is not one whole number"
    if bias_of(linear) is not None and function.parameter(bias_of(linear)) is None:
        return "its bias is computed"
    # of codes and of zero points alike: every term by itself, and all together
    codes = codes.flatten(1).to(torch.int64)
    largest = 255 * (codes.abs().sum(1) + codes.shape[1] * points.to(torch.int64).abs()).max()
    if 2 * int(largest) > SAFE_SUM:
        return f"sums over {codes.shape[1]} inputs could leave int32"
    return None


def _unfit_attention(function: Function, attention: fx.Node) -> str | None:
    """Why an attention cannot read its operands' codes; None when it can."""
    if not attention.kwargs["scale"] > 0:
        return "its scores are not scaled by a positive number"
    for operand, role in zip(attention.args[:3], ROLES, strict=True):
        form = decoded(operand)
        if form is None or form.codes.meta["value"].dtype != "uint8":
            return f"its {role} is not in uint8 codes"
        if number(function, form.zero) != ACTIVATION_ZERO:
            return f"its {role}'s zero point is not {ACTIVATION_ZERO}"
        if _head_scales(function, attention, operand) is None:
            return f"its {role} does not have one stored scale per head"
    return None


def _head_scales(function: Function, attention: fx.Node, operand: fx.Node) -> torch.Tensor | None:
    """The scale of each head [heads] of an attention's operand; None where heads do not have one each."""
    form, queries = decoded(operand), operand is attention.args[0]
    heads, scale = attention.kwargs["heads" if queries else "kv_heads"], function.parameter(form.scale)
    if scale is None or form.group is not None or not bool((scale > 0).all()):
        return None
    if scale.numel() == 1:
        return scale.reshape(1).expand(heads)
    if form.axis is None or form.axis % 3 != 2:
        return None
    scales = scale.reshape(heads, -1)
    return scales[:, 0] if bool((scales == scales[:, :1]).all()) else None


def _integer_attention(function: Function, attention: fx.Node, made_by: str) -> fx.Node:
    """The attention on codes, in front of that on what they stand for; it takes the site."""
    form, site = dict(attention.kwargs), attention.meta.pop("site", None)
    form.pop("products")
    query, key, value = (_head_scales(function, attention, x).double() for x in attention.args[:3])
    score = query * key.repeat_interleave(form["heads"] // form["kv_heads"]) * form.pop("scale")
    build = function.builder(before=attention, made_by=made_by)
    name = site or attention.name
    scales = [
        build.parameter(f"{name}.{what}.scale", scale.float())
        for what, scale in (("score", score), ("value", value))
    ]
    codes = [decoded(operand).codes for operand in attention.args[:3]]
    return build.emit("integer_attention", *codes, *scales, *attention.args[3:], **form, site=site)


def _points(function: Function, weight: Decoded) -> torch.Tensor | None:
    """The zero points of a layer's weights, stored, one for every row or one for all; None when they are neither."""
    if not isinstance(weight.zero, fx.Node):
        return torch.tensor(number(function, weight.zero))
    points = function.parameter(weight.zero)
    return points if points is not None and points.ndim <= 1 else None


def _is_computed(function: Function, value: fx.Node | float | None) -> bool:
    return isinstance(value, fx.Node) and function.parameter(value) is None


class _Products:
    """Layers in whole numbers; what several layers of one input need of it is made once.

    sum (a - p)(c - q) = sum a c - p (sum c - K q) - q sum a, with the activations' zero point p and the weights' q.
    """

    def __init__(self, function: Function, made_by: str):
        self.function, self.made_by = function, made_by
        self._made: dict[tuple[str, fx.Node], fx.Node] = {}

    def integer(self, linear: fx.Node, x: Decoded, weight: Decoded) -> fx.Node:
        """The layer, in front of the linear one."""
        function = self.function
        build = function.builder(before=linear, made_by=self.made_by)
        codes, scale = function.parameter(weight.codes), function.parameter(weight.scale)
        bias, name = bias_of(linear), weight.codes.target.removesuffix(".codes")
        points = _points(function, weight).to(torch.int64).expand(codes.shape[0])
        weights = codes.to(torch.int64).sum(1) - codes.shape[1] * points
        known = not _is_computed(function, x.zero)
        start = -int(number(function, x.zero)) * weights if known else None
        one = function.parameter(x.scale)
        static = known and one is not None and one.numel() == 1
        if static:
            multiplier = (one.double().reshape(()) * scale.double()).float().expand(codes.shape[0])
            if bias is not None:
                wanted = torch.round(function.parameter(bias).double() / multiplier.double())
                if wanted.abs().max() < SAFE_SUM // 2:
                    start, bias = start + wanted.to(torch.int64), None
        sums = self._sums(build, linear, x, weight, start)
        if not known:
            sums = build.sub(sums, build.mul(self._zero(x), _stored(build, f"{name}.sums", weights)))
        if points.any():
            sums = build.sub(sums, build.mul(self._code_sums(x), _stored(build, f"{name}.zero", points)))
        sums = build.cast(sums, dtype="float32")
        if static:
            y = build.mul(sums, build.parameter(f"{name}.multiplier", multiplier))
        else:
            y = build.mul(build.mul(sums, self._scales(build, weight)), x.scale)
        return y if bias is None else build.add(y, bias)

    def grouped(self, linear: fx.Node, x: Decoded, weight: Decoded) -> fx.Node:
        """The layer for an input with scales of groups, in front of the linear one."""
        build = self.function.builder(before=linear, made_by=self.made_by)
        site = linear.meta.pop("site", None)
        sums = build.emit("grouped_integer_linear", x.codes, weight.codes, x.scale, site=site)
        y = build.mul(sums, self._scales(build, weight))
        return y if (bias := bias_of(linear)) is None else build.add(y, bias)

    def _scales(self, build: Builder, weight: Decoded) -> fx.Node:
        """The scale of every row of a layer's weights [rows]."""
        scale = self.function.parameter(weight.scale)
        if scale.ndim:
            return weight.scale
        name = weight.codes.target.removesuffix(".codes")
        rows = weight.codes.meta["value"].shape[0]
        return build.parameter(f"{name}.scales", scale.expand(rows))

    def _sums(
        self, build: Builder, linear: fx.Node, x: Decoded, weight: Decoded, start: torch.Tensor | None
    ) -> fx.Node:
        """Codes times codes, from ``start`` on; the product takes the layer's site."""
        name = weight.codes.target.removesuffix(".codes")
        first = () if start is None else (_stored(build, f"{name}.start", start),)
        site = linear.meta.pop("site", None)
        return build.emit("integer_linear", x.codes, weight.codes, *first, site=site)

    def _zero(self, x: Decoded) -> fx.Node:
        """A computed zero point for every row [..., 1]: so it meets the sums in their own kernel."""

        def make(build: Builder) -> fx.Node:
            rows, zero = (*x.codes.meta["value"].shape[:-1], 1), build.cast(x.zero, dtype="int32")
            if zero.meta["value"].rank:
                return zero
            return build.expand(build.reshape(zero, shape=(1,) * len(rows)), shape=rows)

        return self._once("zero", x, make)

    def _code_sums(self, x: Decoded) -> fx.Node:
        """The sum of the codes in every row [..., 1]: a product with ones."""

        def make(build: Builder) -> fx.Node:
            ones = torch.ones(1, x.codes.meta["value"].shape[-1], dtype=torch.int8)
            return build.integer_linear(x.codes, build.parameter("ones", ones))

        return self._once("sums", x, make)

    def _once(self, what: str, x: Decoded, make: Callable[[Builder], fx.Node]) -> fx.Node:
        """Made behind the codes and what decodes them, where every layer of this input can read it."""
        if (what, x.node) not in self._made:
            self._made[what, x.node] = make(self.function.builder(before=x.node, made_by=self.made_by))
        return self._made[what, x.node]


def _stored(build: Builder, name: str, numbers: torch.Tensor) -> fx.Node:
    return build.parameter(name, numbers.to(torch.int32))
