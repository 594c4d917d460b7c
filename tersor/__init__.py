"""Tersor makes trained Transformers small and fast and compiles them to native code.

    import tersor
    compiled = tersor.compile(model, example_inputs)
    out = compiled(input_ids=ids, attention_mask=mask)

Names are loaded on first use, so ``import tersor`` needs neither torch nor TVM.
"""

from __future__ import annotations

import importlib
from importlib import metadata
from typing import Any

__version__ = metadata.version("tersor")

_HOME = {
    "compile": "tersor.api",
    "capture": "tersor.api",
    "analyze": "tersor.api",
    "explain": "tersor.api",
    "estimate": "tersor.device",
    "to_onnx": "tersor.frontends.onnx.export",
    "load": "tersor.codegen.runtime",
    "load_on": "tersor.device",
    "CompiledModel": "tersor.codegen.runtime",
    "CrossCompiled": "tersor.cross",
    "DeviceModel": "tersor.device",
    "Analysis": "tersor.passes.analysis",
    "Calibration": "tersor.passes",
    "Pipeline": "tersor.passes",
    "Pass": "tersor.passes",
    "PassResult": "tersor.passes",
    "register": "tersor.passes",
    "Program": "tersor.ir",
    "register_op": "tersor.ir",
    "Target": "tersor.targets",
    "TersorError": "tersor.errors",
}

_ROOMS = ("codegen", "frontends", "ir", "passes", "targets")

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"tersor.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'tersor' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
