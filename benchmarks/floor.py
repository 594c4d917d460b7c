"""What no kernel can beat: the arithmetic of a model's quantized products at the rate that this machine reaches."""

from __future__ import annotations

import os

import numpy as np

from benchmarks.kernels.gemm import peak
from benchmarks.models import Model
from tersor.passes import recipes


class Floor:
    """Of the integer products of linear layers; other recipes have none.

    Which layers are quantized needs no data: `int8-dynamic` takes the same ones as `int8`.
    """

    def __init__(self, recipe: str):
        self._integer = recipe.startswith("int8")
        self._macs: dict[tuple[Model, str], int] = {}

    def milliseconds(self, model: Model, inputs: dict[str, np.ndarray], threads: int) -> float | None:
        """Time of the products alone on so many threads, at the peak of this very minute; None without any."""
        if not self._integer:
            return None
        key = (model, repr([value.shape for value in inputs.values()]))
        if key not in self._macs:
            self._macs[key] = _integer_macs(model, inputs)
        allowed = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {min(allowed)})
        try:
            rate = peak("uint8")
        finally:
            os.sched_setaffinity(0, allowed)
        return 1e-6 * 2 * self._macs[key] / (rate * threads)


def _integer_macs(model: Model, inputs: dict[str, np.ndarray]) -> int:
    import tersor
    from tersor.ir import cost

    program, _ = recipes.get("int8-dynamic").run(tersor.capture(model.build(), inputs))
    costs = cost(program).functions["main"].ops
    return sum(of.macs for name, of in costs.items() if "integer_linear" in name)
