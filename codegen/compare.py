"""Contract 1a: the lowered code against the program's torch reference, on by default after every compile."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import asdict, dataclass

import torch

from tersor.errors import BudgetError, CompileError
from tersor.ir.interpreter import run
from tersor.ir.program import Function
from tersor.ir.samples import sample_inputs, sample_states

TOLERANCE = 1e-4
"""Largest error of f32 code, relative to the output's largest magnitude."""

ROUNDED_TOLERANCE = 0.0141
"""Largest distance of code that rounds to codes on the way, relative to the output's norm: a cosine of .9999.

Float sums differ in their last bits between targets; where such a sum lies between two codes, it becomes the other
one, and that is a whole step."""

NOISE_FACTOR, MOST_NOISE = 4.0, 0.25
"""Where a program that rounds amplifies, so that its own float32 and float64 evaluations part by more than the
tolerance, code may be off by this many times that distance, up to a cosine of .97."""

NOISE_INPUTS = 3
"""Inputs that the distance is measured on: whether a sum falls on the other side of a code is a matter of luck."""

Tensors = Mapping[str, torch.Tensor]
Call = Callable[[Tensors, MutableMapping[str, torch.Tensor]], Tensors]
"""From inputs and states by name to outputs; the states' new values replace those in the mapping."""


@dataclass(frozen=True)
class Comparison:
    """One run of both: the sizes of the named dimensions and the error of each output and updated state (``$name``);
    see `compare`.
    """

    sizes: dict[str, int]
    errors: dict[str, float]

    @property
    def worst(self) -> float:
        return max(self.errors.values(), default=0.0)

    def to_dict(self) -> dict:
        return asdict(self)


def compare(function: Function, compiled: Call, tolerance: float | None = None) -> list[Comparison]:
    """Runs both at the smallest, the largest and an odd size of every named dimension, on the same random states.

    The error is the largest difference relative to the output's largest magnitude; in a program that rounds to codes
    the difference's norm relative to the output's.

    Raises:
        CompileError: the program itself fails there.
        BudgetError: an output is further off than ``tolerance``, or not finite where the reference is.
    """
    comparisons = []
    rounded = _rounds(function)
    measure = distance if rounded else relative_error
    tolerance = tolerance or (ROUNDED_TOLERANCE if rounded else TOLERANCE)
    for seed, sizes in enumerate(probe_sizes(function)):
        inputs, states = sample_inputs(function, sizes, seed), sample_states(function, sizes, seed)
        actual_states = dict(states)
        place = f"function {function.name!r} at {sizes or 'its static shapes'}"
        try:
            with torch.inference_mode():
                expected = run(function, inputs, states)
        except Exception as error:  # whatever torch raises
            raise CompileError(
                "the program does not run on the random inputs that the compiled code is compared on",
                where=place,
                why=f"{type(error).__name__}: {error}",
                fix="check the ranges of the dynamic dimensions; verify=False skips the comparison",
            ) from error
        actual = compiled(inputs, actual_states)
        errors = {name: measure(actual[name], expected[name]) for name in function.outputs}
        errors |= {f"${name}": measure(actual_states[name], states[name]) for name in function.states}
        comparisons.append(Comparison(sizes, errors))
        allowed = tolerance
        if rounded and comparisons[-1].worst > tolerance:
            allowed = max(tolerance, min(NOISE_FACTOR * _noise(function, sizes), MOST_NOISE))
        if not comparisons[-1].worst <= allowed:
            worst = max(
                errors, key=lambda name: errors[name] if errors[name] == errors[name] else float("inf")
            )
            raise BudgetError(
                f"the compiled code disagrees with the program: output {worst!r} is off by {errors[worst]:.2e} "
                f"of its scale (tolerance {allowed:.2g})",
                where=place,
                why="a kernel is wrong for this target, or the program amplifies rounding",
                fix="report it with the program (tersor inspect); verify=False skips this comparison",
            )
    return comparisons


def _noise(function: Function, sizes: Mapping[str, int]) -> float:
    """How far the program is from itself in float64, where sums are rounded elsewhere: the most of some inputs.

    Attention in bf16 is left unrounded: kernels round its weights before they are divided by their sum, which is
    as far from rounding them behind as that is from not rounding.
    """
    precise = function.copy(function.parameters)
    for node in precise.calls("attention"):
        node.kwargs = {name: value for name, value in node.kwargs.items() if name != "products"}
    found = [0.0]
    for seed in range(NOISE_INPUTS):
        inputs = sample_inputs(function, sizes, seed)
        with torch.inference_mode():
            expected = run(function, inputs, sample_states(function, sizes, seed))
            actual = run(precise, inputs, sample_states(function, sizes, seed), dtype=torch.float64)
        found += [distance(actual[name], expected[name]) for name in function.outputs]
    return max(found)


def probe_sizes(function: Function) -> list[dict[str, int]]:
    """Size assignments to try: all smallest; each dimension largest in turn; an odd one in between for all."""
    dims = function.dims
    smallest = {name: r.min for name, r in dims.items()}
    probes = [smallest]
    probes += [smallest | {name: r.max} for name, r in dims.items()]
    probes.append(
        {name: min(r.max, max(r.min, (r.min + min(r.max, 64)) // 2 | 1)) for name, r in dims.items()}
    )
    return [dict(p) for p in dict.fromkeys(tuple(sorted(p.items())) for p in probes)]


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """max |actual - expected| / max |expected|; NaN and infinities must agree exactly (else inf)."""
    if expected.numel() == 0:
        return 0.0
    if not expected.is_floating_point():
        return 0.0 if torch.equal(actual, expected) else float("inf")
    finite = torch.isfinite(expected)
    if not torch.equal(finite, torch.isfinite(actual)):
        return float("inf")
    if not finite.any():
        return 0.0
    scale = expected[finite].abs().max().item()
    return (actual[finite] - expected[finite]).abs().max().item() / (scale or 1.0)


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """|actual - expected| / |expected| in the Euclidean norm; NaN and infinities must agree exactly (else inf)."""
    actual, expected = actual.double(), expected.double()
    finite = torch.isfinite(expected)
    if not torch.equal(finite, torch.isfinite(actual)):
        return float("inf")
    norm = expected[finite].norm().item()
    return (actual[finite] - expected[finite]).norm().item() / (norm or 1.0)


def _rounds(function: Function) -> bool:
    """Whether values are rounded to far fewer bits than float32 on the way."""
    narrow = {"bfloat16", "float16", "int8", "uint8"}
    return bool(function.calls("round")) or any(
        node.meta["value"].dtype in narrow or node.kwargs.get("products", "float32") in narrow
        for node in function.calls()
    )
