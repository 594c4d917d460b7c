"""Runs compiled artifacts: numpy, tvm_ffi and TVM's runtime library; no torch, no compiler, no tersor.ir.

`load` and the classes are resolved on first use, so that importing the manifest costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tersor.codegen.runtime.benchmark import BenchmarkResult
    from tersor.codegen.runtime.manifest import FunctionSignature, Manifest, TensorType
    from tersor.codegen.runtime.model import CompiledFunction, CompiledModel, load
    from tersor.codegen.runtime.outputs import Outputs
    from tersor.codegen.runtime.session import Session, SessionFunction

_HOMES = {
    "BenchmarkResult": "benchmark",
    "CompiledFunction": "model",
    "CompiledModel": "model",
    "FunctionSignature": "manifest",
    "Manifest": "manifest",
    "Outputs": "outputs",
    "Session": "session",
    "SessionFunction": "session",
    "TensorType": "manifest",
    "load": "model",
}

__all__ = [
    "BenchmarkResult",
    "CompiledFunction",
    "CompiledModel",
    "FunctionSignature",
    "Manifest",
    "Outputs",
    "Session",
    "SessionFunction",
    "TensorType",
    "load",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
