"""What surrounds a convolution and can be part of it: a scale and a shift per channel (batch norms), zero padding."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import fx

from tersor.ir.matching import Match, P, Rule
from tersor.ir.program import Builder


def _operands(conv: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None]:
    x, weight, bias = (*conv.args, None)[:3]
    return x, weight, bias


def _per_channel(m: Match) -> str | None:
    conv, vector = m["conv"], m.value("vector")
    _, weight, bias = _operands(conv)
    if len(conv.users) > 1:
        return "the convolution's own result is used too"
    if any(p is not None and m.function.parameter(p) is None for p in (weight, bias)):
        return "the weight is computed"
    channels, spatial = conv.meta["value"].shape[1], conv.meta["value"].rank - 2
    wanted = (channels, *(1,) * spatial)
    if vector.shape not in (wanted, (1, *wanted)) or vector.dtype != weight.meta["value"].dtype:
        return f"{vector} is not one number per channel"
    return None


def _scaled(build: Builder, m: Match) -> fx.Node:
    _, weight, bias = _operands(m["conv"])
    vector = m.parameter("vector").reshape(-1)
    kernel: torch.Tensor = m.function.parameter(weight)
    parts = [build.parameter(weight.target, kernel * vector.reshape(-1, *(1,) * (kernel.ndim - 1)))]
    if bias is not None:
        parts.append(build.parameter(bias.target, m.function.parameter(bias) * vector))
    return _with(build, m["conv"], *parts)


def _shifted(build: Builder, m: Match) -> fx.Node:
    _, weight, bias = _operands(m["conv"])
    vector = m.parameter("vector").reshape(-1)
    if bias is None:
        stem = re.sub(r"[._]?weight(_\d+)?$", "", weight.target)
        return _with(build, m["conv"], weight, build.parameter(f"{stem}.bias", vector.clone()))
    return _with(build, m["conv"], weight, build.parameter(bias.target, m.function.parameter(bias) + vector))


def _with(build: Builder, conv: fx.Node, *parameters: fx.Node, **changed: Any) -> fx.Node:
    made = build.emit(conv.target, conv.args[0], *parameters, **{**conv.kwargs, **changed})
    # its place is that of the convolution, not of the norm that follows it
    made.meta.update({key: conv.meta[key] for key in ("module", "source") if key in conv.meta})
    return made


def _widths(m: Match) -> tuple[int, ...] | None:
    """Zeros before and after each spatial axis, equally many."""
    pads, spatial = m["pad"].kwargs["pads"], m["conv"].meta["value"].rank - 2
    if m["pad"].kwargs.get("value", 0.0) != 0 or any(pads[2 * spatial :]) or min(pads) < 0:
        return None
    pairs = [(pads[2 * i], pads[2 * i + 1]) for i in range(min(len(pads) // 2, spatial))][::-1]
    pairs = [(0, 0)] * (spatial - len(pairs)) + pairs
    return tuple(a for a, _ in pairs) if all(a == b for a, b in pairs) else None


def _padded(build: Builder, m: Match) -> fx.Node:
    conv, widths = m["conv"], _widths(m)
    have = conv.kwargs.get("padding", conv.target.attributes["padding"])
    padding = (
        have + widths[0] if isinstance(have, int) else tuple(a + b for a, b in zip(have, widths, strict=True))
    )
    return build.emit(conv.target, m["x"], *conv.args[1:], **{**conv.kwargs, "padding": padding})


_CONV = P.op(("conv1d", "conv2d"), ...).named("conv")

RULES = (
    # conv(x, W, b) * s  ->  conv(x, s W, s b)
    Rule("convolution.scale", P.mul(_CONV, P.parameter("vector")), _scaled, _per_channel),
    # conv(x, W, b) + t  ->  conv(x, W, b + t)
    Rule("convolution.shift", P.add(_CONV, P.parameter("vector")), _shifted, _per_channel),
    # conv(pad(x, p))  ->  conv(x, padding=p)
    Rule(
        "convolution.padding",
        P.op(("conv1d", "conv2d"), P.pad(P.any("x")).named("pad"), ...).named("conv"),
        _padded,
        lambda m: None if _widths(m) else "it does not pad both ends of each spatial axis with as many zeros",
    ),
)
