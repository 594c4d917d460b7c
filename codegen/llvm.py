"""Our targets as TVM knows them."""

from __future__ import annotations

import tvm

from tersor.targets import Target


def llvm_target(target: Target) -> tvm.target.Target:
    """The target of TVM's LLVM back end for this machine."""
    description = {
        "kind": "llvm",
        "mtriple": target.llvm_triple,
        "mcpu": target.mcpu,
        "mattr": list(target.mattr),
    }
    return tvm.target.Target({key: value for key, value in description.items() if value})
