"""What a compiled function does, in order: kernel calls on memory whose place is known.

Made from the Relax function that also becomes the VM's code, after `relax.transform.CallTIRRewrite` has given every
result a buffer: allocations get places, and nothing is left but calls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import tvm
from tvm import relax, tirx
from tvm.ir import Expr

from tersor.codegen.export.functions import PlainKernel, plain_kernel
from tersor.codegen.export.memory import Life, plan_offsets
from tersor.codegen.runtime.manifest import FunctionSignature
from tersor.errors import CompileError

PASSES = (
    relax.transform.DeadCodeElimination,
    relax.transform.ToNonDataflow,
    relax.transform.RemovePurityChecking,
    relax.transform.CallTIRRewrite,
)

SIZE = "n_"
"""What the names of dimensions begin with in C."""

Kind = Literal["input", "output", "state", "weight", "workspace"]


@dataclass(frozen=True)
class Place:
    """Memory that a kernel works on.

    index: which input, output, state or weight of the function; for the workspace, bytes from its beginning.
    """

    kind: Kind
    index: int


@dataclass(frozen=True)
class Step:
    """A call of a kernel: a place for each buffer, then its sizes over the function's dimensions, as C."""

    kernel: PlainKernel
    places: tuple[Place, ...]
    sizes: tuple[str, ...]


@dataclass(frozen=True)
class FunctionPlan:
    """A function of the program.

    workspace: bytes for its intermediate results; scratch: bytes of each thread for its kernels' temporaries.
    """

    name: str
    signature: FunctionSignature
    steps: tuple[Step, ...]
    workspace: int
    scratch: int


def plan(
    module: tvm.IRModule, signatures: Mapping[str, FunctionSignature], prefix: str
) -> tuple[list[FunctionPlan], list[PlainKernel]]:
    """Plans for all functions of a lowered module, and the kernels they call, whose symbols begin with ``prefix``."""
    module = tvm.transform.Sequential([make() for make in PASSES])(module)
    kernels: dict[str, PlainKernel] = {}

    def kernel(name: str) -> PlainKernel:
        if name not in kernels:
            kernels[name] = plain_kernel(prefix + name, module[name])
        return kernels[name]

    plans = [_Planner(module[name], name, s, kernel).plan() for name, s in signatures.items()]
    return plans, list(kernels.values())


class _Planner:
    """Walks the bindings of one function."""

    def __init__(self, function: relax.Function, name: str, signature: FunctionSignature, kernel: Any):
        self._function, self._name, self._signature, self._kernel = function, name, signature, kernel
        self._memory: dict[relax.Var, int] = {}  # variable -> number of its memory
        self._places: list[Place | None] = []  # of each memory; None is the workspace
        self._sizes: list[int] = []
        self._tuples: dict[relax.Var, Sequence[relax.Var]] = {}
        self._calls: list[tuple[PlainKernel, list[relax.Var]]] = []

    def plan(self) -> FunctionPlan:
        signature, function = self._signature, self._function
        kinds: list[tuple[Kind, int]] = [("input", i) for i in range(len(signature.inputs))]
        kinds += [("state", i) for i in range(len(signature.states))]
        kinds += [("weight", i) for i in range(len(signature.weights))]
        for parameter, (kind, index) in zip(function.params, kinds, strict=True):
            self._new(parameter, Place(kind, index))
        for block in function.body.blocks:
            for binding in block.bindings:
                self._bind(binding.var, binding.value)
        results = self._tuple(function.body.body)[: len(signature.outputs)]
        for index, result in enumerate(results):
            memory = self._memory[result]
            if self._places[memory] is not None:
                raise self._unexpected(result, "two outputs, or an output and an input, share memory")
            self._places[memory] = Place("output", index)
        workspace = self._place_workspace()
        steps, scratch = [], 0
        for kernel, buffers in self._calls:
            extents = [buffers[i].ty.shape[axis] for i, axis in kernel.sizes]
            places = tuple(self._places[self._memory[b]] for b in buffers)
            steps.append(Step(kernel, places, tuple(map(to_c, extents))))
            scratch = max(scratch, kernel.scratch([self._range(e) for e in extents]))
        return FunctionPlan(self._name, signature, tuple(steps), workspace, scratch)

    def _bind(self, variable: relax.Var, value: relax.Expr) -> None:
        if isinstance(value, relax.Var):
            if value in self._tuples:
                self._tuples[variable] = self._tuples[value]
            else:
                self._memory[variable] = self._memory[value]
        elif isinstance(value, relax.Tuple):
            self._tuples[variable] = self._tuple(value)
        elif isinstance(value, relax.TupleGetItem):
            self._memory[variable] = self._memory[self._tuple(value.tuple_value)[value.index]]
        elif not isinstance(value, tvm.ir.Call):
            raise self._unexpected(value, type(value).__name__)
        elif isinstance(value.op, tvm.ir.GlobalVar):
            self._calls.append((self._kernel(value.op.name_hint), list(value.args)))
        elif value.op.name == "relax.builtin.alloc_tensor":
            self._new(variable, None)
        elif value.op.name == "relax.reshape":
            self._memory[variable] = self._memory[value.args[0]]
        else:
            raise self._unexpected(value, f"a call of {value.op.name}")

    def _new(self, variable: relax.Var, place: Place | None) -> None:
        self._memory[variable] = len(self._places)
        self._places.append(place)
        size = max(1, (tvm.DataType(str(variable.ty.dtype)).bits + 7) // 8)
        for extent in variable.ty.shape:
            size *= self._range(extent)[1]
        self._sizes.append(size)

    def _tuple(self, value: relax.Expr) -> Sequence[relax.Var]:
        return value.fields if isinstance(value, relax.Tuple) else self._tuples[value]

    def _place_workspace(self) -> int:
        """Gives the memories that are nobody else's their offsets; the bytes they take."""
        uses: dict[int, list[int]] = {}
        for step, (_, buffers) in enumerate(self._calls):
            for buffer in buffers:
                uses.setdefault(self._memory[buffer], []).append(step)
        own = [m for m, place in enumerate(self._places) if place is None and m in uses]
        offsets, size = plan_offsets([Life(self._sizes[m], uses[m][0], uses[m][-1]) for m in own])
        for memory, offset in zip(own, offsets, strict=True):
            self._places[memory] = Place("workspace", offset)
        return size

    def _range(self, extent: Expr) -> tuple[int, int]:
        """The smallest and the largest value of a size."""
        analyzer = tvm.sym.Analyzer()
        for variable in tirx.analysis.undefined_vars(extent):
            low, high = self._signature.dims[variable.name]
            analyzer.update(variable, tvm.sym.ConstIntBound(low, high))
        bound = analyzer.const_int_bound(extent)
        return bound.min_value, bound.max_value

    def _unexpected(self, value: Any, why: str) -> CompileError:
        return CompileError(
            f"function {self._name!r} cannot be exported as C",
            where=str(value),
            why=why,
            fix="report it with the program (tersor inspect)",
        )


_OPERATORS = {tirx.Add: "+", tirx.Sub: "-", tirx.Mul: "*", tirx.FloorDiv: "/", tirx.FloorMod: "%"}


def to_c(size: Expr) -> str:
    """A size, which is never negative, as a C expression of type int64_t."""
    if isinstance(size, tirx.IntImm):
        return f"INT64_C({int(size)})"
    if isinstance(size, tvm.ir.Var):
        return SIZE + size.name
    if isinstance(size, tirx.Cast):
        return to_c(size.value)
    if isinstance(size, tirx.Min | tirx.Max):
        a, b = to_c(size.a), to_c(size.b)
        return f"({a} {'<' if isinstance(size, tirx.Min) else '>'} {b} ? {a} : {b})"
    if type(size) in _OPERATORS:
        return f"({to_c(size.a)} {_OPERATORS[type(size)]} {to_c(size.b)})"
    raise CompileError(f"the size {size} cannot be written in C", fix="report it with the program")
