"""GELU and SiLU that a model spells out."""

from __future__ import annotations

import math

from tersor.ir.matching import P, Pattern, Rule

_X = P.any("x")


def _product(a: object, b: object, c: object) -> Pattern:
    """a * b * c in any order and grouping."""
    return P.one_of(P.mul(a, P.mul(b, c)), P.mul(b, P.mul(a, c)), P.mul(c, P.mul(a, b)))


def _half(a: object, b: object) -> Pattern:
    """a * b / 2."""
    return P.one_of(_product(a, 0.5, b), P.mul(P.div(a, 2), b), P.mul(a, P.div(b, 2)), P.div(P.mul(a, b), 2))


_ERF = P.add(P.erf(P.one_of(P.div(_X, math.sqrt(2)), P.mul(_X, math.sqrt(0.5)))), 1)
_CUBE = P.one_of(P.pow(_X, 3), P.mul(_X, P.mul(_X, _X)), P.mul(_X, P.pow(_X, 2)))
_SQUARE = P.one_of(_product(_X, _X, 0.044715), P.mul(P.pow(_X, 2), 0.044715))
_INNER = P.one_of(
    P.mul(P.add(_X, P.mul(_CUBE, 0.044715)), math.sqrt(2 / math.pi)),
    _product(_X, math.sqrt(2 / math.pi), P.add(_SQUARE, 1)),
)
_TANH = P.add(P.tanh(_INNER), 1)

RULES = (
    # x/2 * (1 + erf(x / sqrt(2)))  ->  gelu(x)
    Rule("activations.gelu", _half(_X, _ERF), lambda b, m: b.gelu(m["x"])),
    # x/2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3)))  ->  gelu_tanh(x)
    Rule("activations.gelu_tanh", _half(_X, _TANH), lambda b, m: b.gelu_tanh(m["x"])),
    # x * sigmoid(1.702 x)  ->  gelu_sigmoid(x)
    Rule(
        "activations.gelu_sigmoid",
        P.mul(_X, P.sigmoid(P.mul(_X, 1.702))),
        lambda b, m: b.gelu_sigmoid(m["x"]),
    ),
    # x * sigmoid(x)  ->  silu(x)
    Rule("activations.silu", P.mul(_X, P.sigmoid(_X)), lambda b, m: b.silu(m["x"])),
)
