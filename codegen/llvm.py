"""Our targets, and single functions, handed to TVM's LLVM back end."""

from __future__ import annotations

import tvm
from tvm import tirx

from tersor.targets import Target


def llvm_target(target: Target) -> tvm.target.Target:
    """The target as TVM describes it."""
    description = {
        "kind": "llvm",
        "mtriple": target.llvm_triple,
        "mcpu": target.mcpu,
        "mattr": list(target.mattr),
    }
    return tvm.target.Target({key: value for key, value in description.items() if value})


def compile_function(function: tirx.PrimFunc, target: Target) -> tvm.runtime.Executable:
    """A module whose only function, "main", is this one; for tests, tuning and benchmarks of single kernels."""
    module = tvm.IRModule({"main": function.with_attr("global_symbol", "main")})
    return tvm.compile(module, target=llvm_target(target))
