"""Our targets, and single functions, handed to TVM's LLVM back end."""

from __future__ import annotations

import tvm
from tvm import tirx

from tersor.codegen import pipeline
from tersor.targets import Target

OPTIONS: dict[str, dict[str, object]] = {
    # single loads of 16 bytes: Cortex-A55 takes longer for a pair of them than for two
    "aarch64": {"cl-opt": ["-aarch64-enable-ldst-opt:bool=0"]},
}
"""What LLVM is told beside CPU and features, by architecture."""


def llvm_target(target: Target) -> tvm.target.Target:
    """The target as TVM describes it."""
    description = {
        "kind": "llvm",
        "mtriple": _with_vendor(target.llvm_triple),
        "mcpu": target.mcpu,
        "mattr": list(target.mattr),
        **OPTIONS.get(target.arch, {}),
    }
    if target.arch == "armv7a":  # how floats are passed to libm
        description["mfloat-abi"] = "soft" if target.os == "android" else "hard"
    return tvm.target.Target({key: value for key, value in description.items() if value})


def _with_vendor(triple: str) -> str:
    """The triple in full: LLVM reads the second part as the vendor, and would miss the system of a shorter one."""
    first, *rest = triple.split("-")
    return triple if rest[0] == "apple" else "-".join([first, "unknown", *rest])


def compile_function(function: tirx.PrimFunc, target: Target) -> tvm.runtime.Executable:
    """A module whose only function, "main", is this one; for tests, tuning and benchmarks of single kernels."""
    module = tvm.IRModule({"main": function.with_attr("global_symbol", "main")})
    return tvm.compile(module, target=llvm_target(target), tir_pipeline=pipeline.PACKED)
