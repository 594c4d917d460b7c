"""Buffers for a kernel's arguments, and TIR variables for the symbolic dimensions in their shapes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from tersor.codegen.kernels.base import TensorSpec
from tersor.ir.dims import Dim, Shape, product


class Arguments:
    """Declares the arguments of the PrimFunc under construction, one buffer per spec, bound by shape.

    Every distinct symbolic extent gets a variable of its own, so an extent such as ``length + 1`` need not be solved.
    """

    def __init__(self) -> None:
        self._variables: dict[Dim, tirx.Var] = {}

    def declare(self, name: str, spec: TensorSpec) -> tirx.Buffer:
        """The next argument."""
        return T.arg(name, T.buffer(self.extents(spec.shape), spec.dtype))

    def flatten(self, buffer: tirx.Buffer, trailing: int = 1) -> tirx.Buffer:
        """A declared argument with all but its last dimensions seen as one; call it after the last ``declare``."""
        lead = len(buffer.shape) - trailing
        if lead == 1:
            return buffer
        rows = product(buffer.shape[:lead])
        return T.decl_buffer((rows, *buffer.shape[lead:]), buffer.dtype, data=buffer.data)

    def extents(self, shape: Shape) -> tuple[int | tirx.Var, ...]:
        """The shape with a variable for each symbolic extent."""
        return tuple(self._variable(d) if isinstance(d, Dim) else d for d in shape)

    def size(self, shape: Shape) -> int | tirx.PrimExpr:
        """The number of elements."""
        return product(self.extents(shape))

    def number(self, dim: int | Dim) -> int | tirx.PrimExpr:
        """The value of a dimension: that of an extent declared before, or computed from those of its symbols."""
        if not isinstance(dim, Dim) or dim in self._variables:
            return dim if not isinstance(dim, Dim) else self._variables[dim]
        return dim.evaluate({name: self._variables[Dim.symbol(name)] for name in dim.symbols})

    def _variable(self, dim: Dim) -> tirx.Var:
        if dim not in self._variables:
            name = str(dim) if dim.is_symbol else f"extent_{len(self._variables)}"
            self._variables[dim] = tirx.Var(name, "int64")
        return self._variables[dim]


@contextmanager
def function(name: str) -> Iterator[tuple[IRBuilder, Arguments]]:
    """The PrimFunc of a kernel, whose arguments do not overlap; ``builder.get()`` is it once the block has ended."""
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name(name)
            T.func_attr({"tirx.noalias": True})
            yield builder, Arguments()
