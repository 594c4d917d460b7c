"""What every kernel family shares: the description of a tensor argument and the protocol of a kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from tersor.ir.dims import Shape

if TYPE_CHECKING:
    from tvm import tirx

    from tersor.targets import Target


@dataclass(frozen=True)
class TensorSpec:
    """Shape (ints and symbolic dimensions) and dtype ("float32", "int64", "bool", ...) of a kernel argument."""

    shape: Shape
    dtype: str = "float32"


class Kernel(Protocol):
    """A frozen, hashable description of one piece of native code; equal descriptions are the same kernel."""

    def name(self) -> str:
        """A readable C identifier; lowering makes it unique."""

    def inputs(self) -> tuple[TensorSpec, ...]: ...

    def outputs(self) -> tuple[TensorSpec, ...]: ...

    def build(self, target: Target) -> tirx.PrimFunc:
        """The scheduled function: one buffer per input, then one per output, in that order."""
