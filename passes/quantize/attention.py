"""Attention on codes: queries, keys, values and weights in 8 bits, with scales fixed beforehand."""

from __future__ import annotations

import torch
from torch import fx

from tersor.ir import Function, Program
from tersor.ir.matching import is_call
from tersor.ir.structure import ROLES
from tersor.passes.base import Lossy, Pass, PassResult
from tersor.passes.calibration import MinMax, Request, Samples, no_range
from tersor.passes.context import Context
from tersor.passes.quantize.grid import Grid
from tersor.passes.quantize.places import ACTIVATION_ZERO, decoded
from tersor.passes.registry import register

SAMPLES = 256
"""Held-out rows of queries, keys and values on which an attention's loss is judged."""


@register("quantize.attention")
class IntegerAttention(Pass):
    """attention(q, k, v)  ->  attention(decode(encode(q)), decode(encode(k)), decode(encode(v))), weights in 8 bits

    Before:  %a = attention(%q, %k, %v, ...)
    After:   %c = quantize(%q, @q.scale, 128, dtype='uint8', axis=2);  %d = dequantize(%c, @q.scale, 128, axis=2); ...
             %a = attention(%d, ..., products='uint8', ...)            exp(score - largest) in multiples of 1/255

    Each head of queries, keys and values has a symmetric scale of its own: the largest magnitude seen over 127. Legal
    where all three are results of linear layers, whose kernels round as they write; what lies behind a rotation, or
    comes from a cache, is left as it is, and so are attentions that lose too much.

    Source: Kim et al. 2021, I-BERT (both products in integers); here the softmax itself stays in float32.

    Options: largest_error (an attention that would lose a larger part of a token's power by this, in the mean over
    sampled held-out tokens that attend to each other, stays as it is; None: none does).
    """

    largest_error: float | None = None

    numerics = Lossy()
    stage = "quantize.activations"
    acts_on = ("attention",)
    calibrated = True

    def problem(self) -> str | None:
        return (
            f"largest_error={self.largest_error}, not positive"
            if self.largest_error is not None and self.largest_error <= 0
            else None
        )

    def requests(self, program: Program) -> list[Request]:
        places = [node for _, node in self.select(program) if _reason(node) is None]
        return [
            request
            for node in places
            for operand in node.args[:3]
            for request in (_extent(operand), *([_sample(operand)] if self.largest_error is not None else []))
        ]

    def run(self, program: Program, context: Context) -> PassResult:
        result = PassResult()
        for function, attention in self.select(program):
            if reason := _reason(attention):
                result.skip(attention, reason)
                continue
            extents = [context.statistics.get(_extent(operand)) for operand in attention.args[:3]]
            reasons = [no_range(e, f"its {role}") for e, role in zip(extents, ROLES, strict=True)]
            if any(reasons):
                result.skip(attention, next(filter(None, reasons)))
                continue
            heads = [attention.kwargs[name] for name in ("heads", "kv_heads", "kv_heads")]
            scales = [_scales(extent, count) for extent, count in zip(extents, heads, strict=True)]
            figures = {}
            if self.largest_error is not None:
                rows = [context.statistics.get(_sample(operand)) for operand in attention.args[:3]]
                if None not in rows:
                    lost = _output_error(attention, [sample.rows.float() for sample in rows], scales)
                    figures["output_error"] = lost
                    if lost > self.largest_error:
                        result.skip(attention, "8 bits would lose too much", **figures)
                        continue
            self._round(function, attention, scales)
            result.change(attention, "queries, keys, values and weights in 8 bits", **figures)
        return result

    def _round(self, function: Function, attention: fx.Node, scales: list[torch.Tensor]) -> None:
        site = attention.meta.get("site") or attention.name
        build, coded = function.builder(before=attention, made_by=self.name), []
        for operand, scale, role in zip(attention.args[:3], scales, ROLES, strict=True):
            stored = build.parameter(f"{site}.{role}.scale", scale)
            codes = build.quantize(operand, stored, ACTIVATION_ZERO, dtype="uint8", axis=2)
            coded.append(build.dequantize(codes, stored, ACTIVATION_ZERO, axis=2))
        attention.args = (*coded, *attention.args[3:])
        attention.kwargs = {**attention.kwargs, "products": "uint8"}


def _reason(attention: fx.Node) -> str | None:
    """Why an attention is left as it is; None when it is not."""
    if attention.kwargs.get("products", "float32") != "float32":
        return "its products are in fewer bits already"
    for operand, role in zip(attention.args[:3], ROLES, strict=True):
        if decoded(operand):
            return f"its {role} is in codes already"
        if not is_call(operand, "linear"):
            return f"its {role} is no result of a linear layer"
    return "an operand has several roles" if len({*attention.args[:3]}) < 3 else None


def _extent(operand: fx.Node) -> Request:
    return Request(operand, MinMax(), of="output")


def _sample(operand: fx.Node) -> Request:
    return Request(operand, Samples(SAMPLES), of="output", split="held_out")


def _scales(extent: MinMax, heads: int) -> torch.Tensor:
    """The scale of each column [heads * size], the same for all of a head."""
    reach = extent.absmax.reshape(heads, -1).amax(1)
    scale, _ = Grid(8).fit(-reach, reach)
    return scale.repeat_interleave(len(extent.absmax) // heads)


def _output_error(attention: fx.Node, rows: list[torch.Tensor], scales: list[torch.Tensor]) -> float:
    """||a' - a||^2 / ||a||^2 of a row of results, the mean over rows; a' by 8 bits.

    The rows of queries, keys and values, [n, channels], are taken for one sequence without a mask.
    """
    grid = Grid(8)
    exact = [x.unsqueeze(0) for x in rows]
    coded = [grid.round_trip(x, scale) for x, scale in zip(exact, scales, strict=True)]
    form = {name: attention.kwargs[name] for name in ("heads", "kv_heads", "scale")}
    form["softcap"] = attention.kwargs.get("softcap")
    wanted = attention.target(*exact, **form)
    lost = (attention.target(*coded, **form, products="uint8") - wanted).square().sum(-1)
    power = wanted.square().sum(-1)
    return (lost / power.clamp(min=torch.finfo(torch.float32).tiny)).mean().item()
