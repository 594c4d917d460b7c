"""From a program to native code: kernels, lowering, artifacts, and the runtime that needs none of the rest.

Names are loaded on first use: the runtime lives below this room and must import neither torch nor TVM's compiler.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "build": "tersor.codegen.compiler",
    "export_c": "tersor.codegen.export.writer",
    "prepare": "tersor.codegen.compiler",
    "register_lowering": "tersor.codegen.lowering",
}

__all__ = ["build", "export_c", "prepare", "register_lowering"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'tersor.codegen' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
