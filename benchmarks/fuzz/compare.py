"""Compares results with a reference, allowing each element what rounding alone can do to it.

Random graphs amplify rounding, and jump where a comparison or a floor sits on an edge. What rounding does is measured:
the reference is repeated in float64 and with noise of a few units in the last place behind every operation.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from tersor.ir import Function, run

TOLERANCE = 1e-4
"""Largest error of f32 code, relative to the output's scale, where nothing amplifies rounding."""
ABSOLUTE = 1e-6
"""The same where the output is nearly zero."""
NOISE = 4e-7
"""Relative to an element; a tenth of it relative to the tensor's largest, or to one."""
REPEATS, FACTOR = 3, 20.0
LOST = 0.05
"""Where rounding alone moves an output by this much of its scale, nothing can be said about it."""

_VIEWS = {
    "reshape",
    "permute",
    "expand",
    "slice",
    "cast",
    "concat",
    "pad",
    "index_select",
    "gather",
    "embedding",
}
"""Operations whose result may be their operand's memory, or is exact."""

_NORMS = {"layer_norm", "rms_norm"}

_FLOORS = {"erf": 1.3e-6, "gelu": 6e-7}
"""Noise of operations whose kernels state an absolute error (`tersor.codegen.kernels.math`): most of a small result."""

Tensors = Mapping[str, torch.Tensor]


def spread(
    function: Function, inputs: Tensors, seed: int = 0
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The results in float32, and for each element how far rounding moves it (inf where it is unknown)."""
    with torch.no_grad():
        expected = run(function, inputs)
        slack = {name: torch.zeros(value.shape, dtype=torch.float64) for name, value in expected.items()}

        def allow(others: Tensors) -> None:
            for name, reference in expected.items():
                slack[name] = torch.maximum(slack[name], distance(others[name], reference))

        allow(run(function, inputs, dtype=torch.float64))
        for i in range(REPEATS):
            for sign in (1.0, -1.0):  # an edge that lies near is crossed by one of the two
                allow(_shaken(function, inputs, sign * NOISE, torch.Generator().manual_seed(seed + i)))
    return expected, slack


def _shaken(
    function: Function, inputs: Tensors, scale: float, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """The results with noise behind every operation; ``scale`` is `NOISE`, either way."""

    def shaken(value: torch.Tensor, floor: float = 0.0) -> torch.Tensor:
        finite = torch.nan_to_num(value, 0.0, 0.0, 0.0).abs()
        noise = torch.randn(value.shape, generator=generator)
        return value + noise * scale * (finite + 0.1 * finite.max().clamp(min=1.0) + floor / NOISE)

    seen: dict[fx.Node, torch.Tensor] = {}

    def shake(node: fx.Node, value: torch.Tensor) -> None:
        if value.dtype == torch.float32 and value.numel():
            if node.target.name in _NORMS:  # the differences that it takes are rounded too
                operands = [_value(a, function, inputs, seen) for a in node.args]
                value.copy_(node.target(shaken(operands[0]), *operands[1:], **node.kwargs))
            if node.target.name not in _VIEWS:
                value.copy_(shaken(value, _FLOORS.get(node.target.name, 0.0)))
        seen[node] = value

    return run(function, inputs, observe=shake)


def _value(
    operand: object, function: Function, inputs: Tensors, seen: Mapping[fx.Node, torch.Tensor]
) -> torch.Tensor | None:
    if not isinstance(operand, fx.Node):
        return None
    if operand.op == "placeholder":
        return inputs[operand.target]
    return seen[operand] if operand in seen else function.parameter(operand)


def distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """|a - b| by element; inf where exactly one is finite, or infinities differ."""
    a, b = a.double(), b.double()
    same = (a == b) | (a.isnan() & b.isnan())
    return torch.where(same, 0.0, torch.nan_to_num((a - b).abs(), float("inf"), float("inf")))


def disagreement(actual: Tensors, expected: Tensors, slack: Tensors) -> str | None:
    """What is wrong with the results, in words; None when they agree.

    Raises:
        IllConditioned: rounding alone moves a whole output by `LOST` of its scale.
    """
    lost = []
    for name, reference in expected.items():
        if name not in actual:
            return f"output {name!r} is missing"
        found = actual[name]
        if found.shape != reference.shape or found.dtype != reference.dtype:
            return f"output {name!r} is {_kind(found)}, expected {_kind(reference)}"
        finite = reference.double().isfinite()
        scale = reference.double()[finite].abs().max().item() if finite.any() else 0.0
        allowed = FACTOR * slack[name]
        if reference.is_floating_point():
            allowed = allowed + max(TOLERANCE * scale, ABSOLUTE)
            if reference.numel() and (slack[name] * FACTOR > LOST * max(scale, ABSOLUTE)).all():
                lost.append(name)
        bad = distance(found, reference) > allowed
        if bad.any():
            at = tuple(torch.nonzero(bad)[0].tolist())
            ours, theirs, limit = (t[at].item() for t in (found, reference, allowed))
            return (
                f"output {name!r}: {int(bad.sum())} of {bad.numel()} elements are off; at {list(at)} it is {ours!r}, "
                f"expected {theirs!r} (allowed {limit:.2e}, scale {scale:.3g})"
            )
    if lost and len(lost) == len(expected):
        raise IllConditioned(", ".join(lost))
    return None


def _kind(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype}{list(tensor.shape)}"


class IllConditioned(Exception):
    """Rounding alone decides the results."""
