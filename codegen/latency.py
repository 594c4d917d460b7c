"""How long a program takes on a target, kernel by kernel: what stage gates ask for instead of a whole compile.

Each distinct kernel is timed once on this machine and remembered for as long as the process lives; a program's
latency is the sum over its calls. Passes change few kernels, so a new version of a program costs little.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np
import tvm

from tersor.codegen import (
    rules,  # noqa: F401  registers the lowerings
    timing,
)
from tersor.codegen.kernels.base import Kernel
from tersor.codegen.llvm import compile_function
from tersor.codegen.lowering import legalize, lower
from tersor.errors import TargetError
from tersor.ir.costs import node_cost
from tersor.ir.program import Program
from tersor.ir.site import sites
from tersor.targets import Target, missing_on_host

SECONDS = 0.05
"""Time spent on one kernel; the fastest call counts, as other work on the machine only ever adds."""

COLD_BYTES = 64e6
"""Bytes of copies of the arguments that a timing walks over, so that weights come from memory as in a model."""


class Latency:
    """Seconds per call of a program's ``main``; serves the gates as their ``Measure``.

    Args:
        target: must be one that this machine can run.
        sizes: of the named dimensions; the largest of each where absent.

    Raises:
        TargetError: this machine lacks a feature of the target.
    """

    def __init__(self, target: Target, sizes: Mapping[str, int] | None = None):
        if missing := missing_on_host(target):
            raise TargetError(
                f"code for {target.name!r} cannot be timed on this machine",
                why=f"its CPU lacks {', '.join(sorted(missing))}",
                fix="compile without a gate on latency, or on the target itself",
            )
        self.target, self.sizes = target, dict(sizes or {})
        self._seconds: dict[Kernel, float] = {}

    def __call__(self, program: Program) -> float:
        """Raises CompileError when the program cannot be lowered."""
        lowered = lower(self._legal(program), self.target)
        return sum(self._kernel(kernel) for kernel, _ in lowered.origins)

    def by_site(self, program: Program) -> dict[str, float]:
        """Seconds that each site takes, those of a kernel that serves several in proportion to their products; what
        belongs to none is under "". Raises CompileError as above.
        """
        legal = self._legal(program)
        named = {site.node: site.name for site in sites(legal)}
        seconds: Counter[str] = Counter()
        for kernel, nodes in lower(legal, self.target).origins:
            work = [int(node_cost(node).macs) for node in nodes]
            for node, macs in zip(nodes, work, strict=True):
                seconds[named.get(node, "")] += self._kernel(kernel) * (
                    macs / sum(work) if macs else 1 / len(nodes)
                )
            if not nodes:
                seconds[""] += self._kernel(kernel)
        return dict(seconds)

    def _legal(self, program: Program) -> Program:
        """``main`` alone at its sizes, as operations that have kernels."""
        sizes = {name: r.max for name, r in program.main.dims.items()}
        static = program.specialize(sizes | {k: v for k, v in self.sizes.items() if k in sizes})
        static.functions = {static.main.name: static.main}
        return legalize(static)

    def _kernel(self, kernel: Kernel) -> float:
        if kernel not in self._seconds:
            self._seconds[kernel] = seconds_per_call(kernel, self.target)
        return self._seconds[kernel]


def seconds_per_call(kernel: Kernel, target: Target) -> float:
    """The fastest of many calls of a kernel with static shapes, walking over copies of its arguments."""
    call = compile_function(kernel.build(target), target)["main"]
    generator = np.random.default_rng(0)

    def argument(spec) -> tvm.runtime.Tensor:
        if spec.dtype.startswith("float"):
            data = generator.standard_normal(spec.shape, dtype=np.float32).astype(spec.dtype)
        else:
            # valid as positions and as masks; one alone is the first position of several
            data = np.full(spec.shape, 1 if spec.shape else 0, spec.dtype)
        return tvm.runtime.tensor(data)

    specs = (*kernel.inputs(), *kernel.outputs())
    size = sum(int(np.prod(s.shape, dtype=float)) * np.dtype(s.dtype).itemsize for s in specs)
    copies = [[argument(s) for s in specs] for _ in range(1 + min(16, int(COLD_BYTES // max(size, 1))))]
    return timing.seconds_per_call(call, copies, SECONDS)
