"""The program: what it is, how it is read, matched, rewritten, checked, costed and saved."""

from tersor.ir import opset as _opset  # noqa: F401  fills the dialect
from tersor.ir.dialect import Cost, Op, ops, register_op
from tersor.ir.dims import Dim, Shape
from tersor.ir.interpreter import run
from tersor.ir.parameters import Parameter, ParameterStore
from tersor.ir.program import Builder, Function, Program, Range
from tersor.ir.value import Value
from tersor.ir.verify import verify

__all__ = [
    "Builder", "Cost", "Dim", "Function", "Op", "Parameter", "ParameterStore", "Program", "Range", "Shape", "Value",
    "ops", "register_op", "run", "verify",
]  # fmt: skip
