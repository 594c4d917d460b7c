"""Compares the results of two versions of a program."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from tersor.ir import Function, Program, run
from tersor.ir.interpreter import bind_dims
from tersor.ir.samples import sample_inputs, sample_states

Inputs = Mapping[str, Mapping[str, torch.Tensor]]
"""By function and input name."""
Outputs = dict[str, dict[str, torch.Tensor]]
"""By function and output name; ``$name`` is the new value of a state."""

_SIZES = (2, 7, 5, 3, 11, 13)  # small, and different, so that mixed-up dimensions show


def small_sizes(function: Function) -> dict[str, int]:
    """Small sizes of a function's dynamic dimensions, within their ranges."""
    return {
        n: max(r.min, min(r.max, _SIZES[i % len(_SIZES)])) for i, (n, r) in enumerate(function.dims.items())
    }


def small_inputs(program: Program, seed: int = 0) -> Inputs:
    """Inputs for every function, with small sizes of the dynamic dimensions."""
    return {name: sample_inputs(f, small_sizes(f), seed) for name, f in program.functions.items()}


def outputs(program: Program, inputs: Inputs, dtype: torch.dtype | None = None) -> Outputs:
    """The results of every function that ``inputs`` has inputs for, computed in ``dtype`` (None: its own).

    Each runs on states as earlier calls could have left them.
    """
    results = {}
    with torch.no_grad():
        for name, given in inputs.items():
            function = program.functions[name]
            states = sample_states(function, bind_dims(function.inputs, given))
            results[name] = run(function, given, states, dtype=dtype)
            results[name] |= {f"${state}": states[state] for state in function.updates}
    return results


def relative_error(reference: Outputs, actual: Outputs) -> float:
    """max |actual - reference| / max |reference| of the worst output; inf where NaN, shape or an integer differs."""
    errors = [
        _tensor_error(tensor, actual[name][output])
        for name, tensors in reference.items()
        for output, tensor in tensors.items()
    ]
    return max(errors, default=0.0)


def precision(results: Outputs) -> float:
    """The unit in the last place, relative to one, of the coarsest float type among the outputs."""
    types = {t.dtype for tensors in results.values() for t in tensors.values() if t.is_floating_point()}
    return max((torch.finfo(dtype).eps for dtype in types), default=0.0)


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def _tensor_error(reference: torch.Tensor, actual: torch.Tensor) -> float:
    if _same(reference, actual):
        return 0.0
    if reference.shape != actual.shape or not reference.is_floating_point():
        return float("inf")
    finite = torch.isfinite(reference)
    if not torch.equal(finite, torch.isfinite(actual)) or not _same(reference[~finite], actual[~finite]):
        return float("inf")
    reference, actual = reference[finite].double(), actual[finite].double()
    scale = reference.abs().max().item()
    return (actual - reference).abs().max().item() / scale if scale else float("inf")
