"""Timing of a compiled function."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tersor.errors import InputError

if TYPE_CHECKING:
    from tersor.codegen.runtime.model import CompiledFunction

_SECONDS, _LEAST, _MOST = 1.0, 10, 10_000


@dataclass(frozen=True)
class BenchmarkResult:
    """Times of one call in milliseconds over `calls` calls on `threads` threads; `inputs` says of what."""

    min: float
    median: float
    p90: float
    calls: int
    threads: int
    inputs: str

    def __str__(self) -> str:
        count = f"{self.threads} thread{'s' * (self.threads > 1)}"
        return (
            f"{self.median:.3f} ms median, {self.min:.3f} ms min, {self.p90:.3f} ms p90"
            f" ({self.calls} calls, {count}; {self.inputs})"
        )


def measure(
    function: CompiledFunction,
    inputs: Mapping[str, Any] | None,
    dims: Mapping[str, int],
    calls: int | None,
    threads: int | None,
) -> BenchmarkResult:
    """See `CompiledFunction.benchmark`. Raises InputError for unusable inputs, sizes or numbers."""
    if calls is not None and (not isinstance(calls, int) or calls < 1):
        raise InputError(f"calls={calls!r} cannot be timed", fix="give a whole number above 0, or None")
    if inputs is not None and dims:
        raise InputError("inputs and dims were both given", fix="dims are for inputs made from the signature")
    if inputs is None:
        inputs = make_inputs(function, dims)
    model = function.model
    before = model.threads
    try:
        if threads is not None:
            model.threads = threads
        used = model.threads
        if function.signature.states:
            session = model.session()
            call = session.functions[function.name]
            times = _times(lambda: call(**inputs), calls, session.reset)
        else:
            times = _times(lambda: function(**inputs), calls)
    finally:
        model.threads = before
    low, median, p90 = np.percentile(times, (0, 50, 90)) / 1e6
    shapes = ", ".join(
        f"{name} {'x'.join(map(str, np.shape(value))) or 'scalar'}" for name, value in inputs.items()
    )
    return BenchmarkResult(float(low), float(median), float(p90), len(times), used, shapes)


def make_inputs(function: CompiledFunction, dims: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Inputs that fit the signature, always the same: see `CompiledFunction.benchmark`."""
    signature = function.signature
    if unknown := sorted(set(dims) - set(signature.dims)):
        raise InputError(
            f"there is no dimension {unknown[0]!r}",
            fix=f"use {', '.join(signature.dims)}" if signature.dims else "leave it out: all sizes are fixed",
        )
    sizes = {name: high for name, (_, high) in signature.dims.items()} | dict(signature.example) | dict(dims)
    shapes = function.arguments.shapes(sizes)
    function.arguments.dimensions(shapes)
    random = np.random.default_rng(0)
    made = {}
    for tensor, shape in zip(signature.inputs, shapes, strict=True):
        if np.dtype(tensor.dtype).kind == "f":
            values = random.standard_normal(shape)
        else:  # the first position of a state has room for whatever follows
            values = np.full(shape, 0 if signature.states and not shape else 1)
        made[tensor.name] = values.astype(tensor.dtype)
    return made


def _times(call: Callable, calls: int | None, before: Callable = lambda: None) -> list[int]:
    """Nanoseconds of each call without what is done before it, after three that are not counted."""
    for _ in range(3):
        before()
        call()
    times: list[int] = []
    start = time.perf_counter()
    while len(times) < (calls or _MOST):
        if calls is None and len(times) >= _LEAST and time.perf_counter() - start > _SECONDS:
            break
        before()
        begin = time.perf_counter_ns()
        call()
        times.append(time.perf_counter_ns() - begin)
    return times
