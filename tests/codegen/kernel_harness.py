"""Runs one kernel on numpy arrays: builds it for a target, binds its symbolic dimensions, checks what it wrote."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import tvm

from tersor.codegen.kernels.base import Kernel
from tersor.codegen.llvm import compile_function
from tersor.ir.dims import Dim, evaluate_shape
from tersor.targets import Target


@cache
def compile_kernel(kernel: Kernel, target: Target) -> tvm.runtime.Executable:
    """The kernel as a callable module with one function "main"; equal kernels are compiled once."""
    return compile_function(kernel.build(target), target)


def run_kernel(
    kernel: Kernel,
    arrays: Sequence[np.ndarray],
    target: Target,
    output_shapes: Sequence[tuple[int, ...]] | None = None,
) -> list[np.ndarray]:
    """The kernel's outputs. ``output_shapes`` is needed where a symbol occurs in no input.

    Outputs start as NaN (or a pattern, for integers), so an element that is never written cannot pass for right.
    """
    symbols: dict[str, int] = {}
    assert len(arrays) == len(kernel.inputs())
    for spec, array in zip(kernel.inputs(), arrays, strict=True):
        assert str(array.dtype) == spec.dtype, f"{array.dtype} given for {spec}"
        for dim, size in zip(spec.shape, array.shape, strict=True):
            if isinstance(dim, Dim) and dim.is_symbol:
                assert symbols.setdefault(str(dim), size) == size
        assert not isinstance(spec.shape, list)
    shapes = output_shapes or [evaluate_shape(spec.shape, symbols) for spec in kernel.outputs()]
    results = []
    for spec, shape in zip(kernel.outputs(), shapes, strict=True):
        fill = np.nan if "float" in spec.dtype else 77
        results.append(tvm.runtime.tensor(np.full(shape, fill, dtype=spec.dtype)))
    compile_kernel(kernel, target)["main"](
        *(tvm.runtime.tensor(np.asarray(a, order="C")) for a in arrays), *results
    )
    return [result.numpy() for result in results]
