"""The program: what it is, how it is read, matched, rewritten, checked, costed and saved."""

from tersor.ir import opset as _opset  # noqa: F401  fills the dialect
from tersor.ir.block import blocks
from tersor.ir.costs import CostReport, cost
from tersor.ir.dialect import Cost, Op, ops, register_op
from tersor.ir.dims import Dim, Shape
from tersor.ir.interpreter import run
from tersor.ir.parameters import Parameter, ParameterStore
from tersor.ir.program import Builder, Function, Program, Range, is_state
from tersor.ir.serialize import load_program, save_program
from tersor.ir.site import Site, find_site, select, sites
from tersor.ir.text import diff, print_program
from tersor.ir.value import Value
from tersor.ir.verifier import verify

__all__ = [
    "Builder", "Cost", "CostReport", "Dim", "Function", "Op", "Parameter", "ParameterStore", "Program", "Range",
    "Shape", "Site", "Value", "blocks", "cost", "diff", "find_site", "is_state", "load_program", "ops", "print_program",
    "register_op", "run", "save_program", "select", "sites", "verify",
]  # fmt: skip
