"""Layer norms and RMS norms that a model spells out, and weights multiplied on afterwards."""

from __future__ import annotations

from torch import fx

from tersor.ir.matching import Match, P, Rule
from tersor.ir.program import Builder


def _over_last_axis(m: Match) -> str | None:
    rank = m.value("x").rank
    for node in m.nodes:
        if node.target.name == "mean" and not (
            {d % rank for d in node.kwargs["dims"]} == {rank - 1} and node.kwargs.get("keepdim")
        ):
            return f"the mean is over {node.kwargs['dims']} of rank {rank}, not over the last axis"
    if not m.value("x").is_float:
        return f"it normalises {m.value('x').dtype}"
    return None


def _is_vector(m: Match, name: str) -> str | None:
    wanted = m.value("x").shape[-1:]
    return None if m.value(name).shape == wanted else f"{m.value(name)} is not one number per channel"


def _same_type(m: Match, name: str) -> str | None:
    if m.value(name).dtype != m.value("x").dtype:
        return f"{m.value(name)} has another type than {m.value('x')}"
    return _is_vector(m, name)


_X = P.any("x")
_CENTRED = P.sub(_X, P.mean(_X))


def _squares(x):
    return P.one_of(P.mul(x, x), P.pow(x, 2))


def _normalised(x):
    """x / sqrt(mean(x^2) + eps) in the forms in which people write it."""
    mean = P.add(P.mean(_squares(x)), P.number("eps"))
    return P.one_of(
        P.mul(x, P.rsqrt(mean)),
        P.div(x, P.sqrt(mean)),
        P.mul(x, P.pow(mean, -0.5)),
        P.mul(x, P.reciprocal(P.sqrt(mean))),
        P.mul(x, P.div(1, P.sqrt(mean))),
        P.div(x, P.pow(mean, 0.5)),
    )


def _folded(x):
    """TensorFlow's way, x * s + (bias - mean * s) with s = weight / sqrt(var + eps)."""
    mean = P.mean(x).named("mean")
    variance = P.add(P.mean(_squares(P.sub(x, mean))), P.number("eps"))
    inverse = P.one_of(P.rsqrt(variance), P.reciprocal(P.sqrt(variance)), P.div(1, P.sqrt(variance)))
    scale = P.mul(inverse, P.any("weight")).named("scale")
    return P.add(P.mul(x, scale), P.sub(P.any("bias"), P.mul(P.any("mean"), P.any("scale"))))


def _weighted(build: Builder, m: Match) -> fx.Node:
    norm = m["norm"]
    return build.emit(norm.target, m["x"], m["weight"], **norm.kwargs)


def _shifted(build: Builder, m: Match) -> fx.Node:
    norm = m["norm"]
    weight = norm.args[1] if len(norm.args) > 1 else None
    return build.layer_norm(m["x"], weight, m["bias"], **norm.kwargs)


def _no_bias_yet(m: Match) -> str | None:
    return "the norm has a bias" if len(m["norm"].args) > 2 and m["norm"].args[2] is not None else None


RULES = (
    # (x - mean(x)) * rsqrt(mean((x - mean(x))^2) + eps)  ->  layer_norm(x)
    Rule(
        "norms.layer_norm",
        _normalised(_CENTRED),
        lambda b, m: b.layer_norm(m["x"], eps=m["eps"]),
        _over_last_axis,
    ),
    # s = w * rsqrt(mean((x - mean(x))^2) + eps); x * s + (b - mean(x) * s)  ->  layer_norm(x, w, b)
    Rule(
        "norms.folded",
        _folded(_X),
        lambda b, m: b.layer_norm(m["x"], m["weight"], m["bias"], eps=m["eps"]),
        lambda m: _over_last_axis(m) or _same_type(m, "weight") or _same_type(m, "bias"),
    ),
    # x * rsqrt(mean(x^2) + eps)  ->  rms_norm(x)
    Rule("norms.rms_norm", _normalised(_X), lambda b, m: b.rms_norm(m["x"], eps=m["eps"]), _over_last_axis),
    # norm(x) * w  ->  norm(x, w)
    Rule(
        "norms.weight",
        P.mul(P.op(("layer_norm", "rms_norm"), _X).named("norm"), P.any("weight")),
        _weighted,
        lambda m: _same_type(m, "weight"),
    ),
    # layer_norm(x, w) + b  ->  layer_norm(x, w, b)
    Rule(
        "norms.bias",
        P.add(P.layer_norm(_X, ...).named("norm"), P.any("bias")),
        _shifted,
        lambda m: _no_bias_yet(m) or _same_type(m, "bias"),
    ),
)
