"""From a function of the program to a Relax function: one ``call_tir`` per group, each into a kernel of ours.

The rules for single operations live in `tersor.codegen.rules`; third parties add theirs with `register_lowering`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import tvm
from torch import fx
from tvm import relax, tirx

from tersor.codegen import fusion, tiles
from tersor.codegen.kernels.base import Kernel
from tersor.codegen.kernels.chain import Chain, ChainInput
from tersor.codegen.kernels.elementwise import Elementwise
from tersor.codegen.kernels.gemm import Gemm
from tersor.codegen.kernels.inner_product import multiplies_fp16, stored_words
from tersor.codegen.kernels.prepare import Prepare, prepared
from tersor.codegen.packing import Words
from tersor.codegen.state import StateMemory
from tersor.codegen.weights import Weight
from tersor.errors import CompileError
from tersor.ir.canonicalize.constants import fold_constants
from tersor.ir.canonicalize.precision import HALF, MOVES
from tersor.ir.decompose import decompose
from tersor.ir.dialect import Op
from tersor.ir.dims import Dim, Shape
from tersor.ir.program import Function, Program
from tersor.ir.verifier import describe
from tersor.targets import Target

Lower = Callable[["Lowering", fx.Node], relax.Expr]

_rules: dict[str, Lower] = {}
_conditions: dict[str, Callable[[fx.Node], bool]] = {}


def register_lowering(
    op: Op | str, *, when: Callable[[fx.Node], bool] | None = None
) -> Callable[[Lower], Lower]:
    """Decorates ``rule(lowering, node) -> relax.Expr``: how code is made of one operation.

    ``when``: the nodes that the rule is for; others are decomposed.

    Raises:
        CompileError: the operation has a lowering already.
    """
    name = op if isinstance(op, str) else op.name

    def register(rule: Lower) -> Lower:
        if name in _rules:
            raise CompileError(f"operation {name!r} has a lowering already")
        _rules[name] = rule
        if when is not None:
            _conditions[name] = when
        return rule

    return register


def has_lowering(node: fx.Node) -> bool:
    """Whether code can be made of an operation as it is."""
    name = node.target.name
    if node.target.elementwise is not None:
        return True
    return name in _rules and (name not in _conditions or _conditions[name](node))


@dataclass
class Lowered:
    """A program as an IRModule, with the weights that follow inputs and states in each function's parameters."""

    module: tvm.IRModule
    weights: dict[str, tuple[Weight, ...]] = field(default_factory=dict)  # by function name
    kernels: dict[Kernel, str] = field(default_factory=dict)  # with their symbols in the module
    origins: list[tuple[Kernel, tuple[fx.Node, ...]]] = field(default_factory=list)  # of each call


def lower(program: Program, target: Target) -> Lowered:
    """Every function of a legal program (see `legalize`) as Relax.

    Raises:
        CompileError: operations or dtypes that no kernel covers, all listed at once.
    """
    check_supported(program)
    builder = relax.BlockBuilder()
    result = Lowered(tvm.IRModule())
    for function in program.functions.values():
        lowering = Lowering(function, target, builder, result)
        lowering.run()
        result.weights[function.name] = tuple(lowering.weights)
    result.module = builder.finalize()
    return result


def legalize(program: Program) -> Program:
    """A copy in which every operation without a lowering is decomposed, as far as decompositions reach.

    What decompositions compute from parameters alone (a weight from its codes) becomes a parameter.
    """
    program = program.copy()
    for function in program.functions.values():
        made = set(decompose(function, has_lowering))
        if made:
            others = [n for n in function.calls() if not _depends(n, made)]
            fold_constants(function, others, may_grow=True)
    return program


def _depends(node: fx.Node, made: set[fx.Node]) -> bool:
    """Whether a node is, or reads, one of those; it joins them when it does."""
    if node not in made and any(operand in made for operand in node.all_input_nodes):
        made.add(node)
    return node in made


SUPPORTED_DTYPES = {"float32", "int64", "int32", "int8", "uint8", "bool"}


def check_supported(program: Program) -> None:
    """Raises CompileError naming every operation and dtype that this code generator does not cover."""
    operations: dict[str, list[str]] = {}
    dtypes: dict[str, list[str]] = {}
    for _, node in program.nodes():
        if node.op == "output":
            continue
        value = node.meta["value"]
        if node.op == "call_function" and not has_lowering(node):
            operations.setdefault(f"operation {node.target.name!r} has no lowering", []).append(
                describe(node)
            )
        elif value.dtype not in SUPPORTED_DTYPES and not _is_only_stored(node):
            dtypes.setdefault(f"dtype {value.dtype} is not supported", []).append(describe(node))
    if operations or dtypes:
        problems = {**operations, **dtypes}
        lines = [f"  - {what}: {len(nodes)}x, first at {nodes[0]}" for what, nodes in problems.items()]
        fixes = [
            "give each operation a decomposition (ir.register_op) or a lowering (codegen.register_lowering)",
            "cast to float32 what is computed with, as captured models are; recipe='bf16' or 'fp16' halves it then",
        ]
        raise CompileError(
            "the program cannot be lowered:\n" + "\n".join(lines),
            fix="; ".join(fix for fix, found in zip(fixes, (operations, dtypes), strict=True) if found),
        )


def _is_only_stored(node: fx.Node) -> bool:
    """Whether a node is of a dtype that it may have because nothing is computed there."""
    return node.meta["value"].dtype in HALF and (node.op != "call_function" or node.target.name in MOVES)


def _groups(anchor: fx.Node) -> int | None:
    """How many scales a linear layer's kernel applies to each of its rows (`Gemm.groups`)."""
    scales = fusion.scales_of(anchor)
    return None if scales is None else scales.meta["value"].shape[-1]


class Lowering:
    """The state while one function is lowered; lowering rules emit kernel calls through it.

    Attributes:
        target: what the code is for.
        function: the function being lowered.
        plan: which nodes share a kernel.
    """

    def __init__(self, function: Function, target: Target, builder: relax.BlockBuilder, lowered: Lowered):
        narrow = fusion.BF16 | {"float16"} if multiplies_fp16(target) else fusion.BF16
        self.function, self.target, self.plan = function, target, fusion.plan(function, narrow)
        self.weights: dict[Weight, relax.Var] = {}
        self._builder, self._lowered = builder, lowered
        self._dims = {name: tirx.Var(name, "int64") for name in function.dims}
        self._values: dict[fx.Node, relax.Expr] = {}
        self.memory = StateMemory(function, self.plan)
        self._current: tuple[fx.Node, ...] = ()

    def run(self) -> None:
        """Adds the Relax function, named as the program's, to the module."""
        inputs = []
        for node in (*self.function.input_nodes, *self.function.state_nodes.values()):
            self._values[node] = relax.Var(node.target, self.type(node.meta["value"]))
            self.memory.made(node)
            inputs.append(self._values[node])
        with self._builder.function(self.function.name):
            with self._builder.dataflow():
                for node in self.function.nodes:
                    if node.op == "call_function" and node not in self.plan.inner:
                        self._current = (node,)
                        self.define(node, self._lower(node))
                self._current = ()
                results = self._distinct([self.value(node) for node in self.function.results])
                # what nobody reads would be dropped, so the states are results too
                output = self._builder.emit_output(relax.Tuple([*results, *self._updates()]))
            self._builder.emit_func_output(output, [*inputs, *self.weights.values()])
        # the planner sizes storage of symbolic shapes by their upper bounds
        bounds = {name: r.max for name, r in self.function.dims.items()}
        handle = self._builder.get().get_global_var(self.function.name)
        function = self._builder.get()[handle].with_attr("tir_var_upper_bound", bounds)
        self._builder.update_func(handle, function.with_attr("num_input", len(inputs)))

    def _lower(self, node: fx.Node) -> relax.Expr:
        if node in self.plan.groups:
            return self._lower_group(self.plan.groups[node])
        return _rules[node.target.name](self, node)

    def _lower_group(self, group: fusion.Group) -> relax.Expr:
        """A GEMM with an epilogue, or element-wise work by itself."""
        chain, feeds = fusion.build_chain(group)
        shape = group.root.meta["value"].shape
        if not group.anchors:
            shapes = tuple(opaque(feed.meta["value"].shape) for feed in feeds)
            kernel = Elementwise(chain, shapes, opaque(shape))
            return self.call(kernel, [self.value(feed) for feed in feeds], [shape])
        weights = [fusion.stored_weight(anchor) for anchor in group.anchors]
        n = weights[0].meta["value"].shape[0]
        gemm = self.gemm(group.anchors[0], n, chain, len(weights))
        join = "beside" if len(weights) > 1 else "stacked"
        packed = self.weight(Weight(tuple(w.target for w in weights), gemm.panel, join, gemm.words))
        args = self.operands(group.anchors[0], gemm, packed)
        specs = gemm.inputs()[len(args) :]
        args += [self.view(feed, spec.shape) for feed, spec in zip(feeds, specs, strict=True)]
        return self.call(gemm, args, [shape], of=group.anchors)

    def _distinct(self, results: list[relax.Expr]) -> list[relax.Expr]:
        """Results the caller may keep: an input, a weight, a state or a value returned twice is copied."""
        own: list[relax.Expr] = []
        for result, node in zip(results, self.function.results, strict=True):
            borrowed = node.op != "call_function" or any(result is other for other in own)
            borrowed |= self.memory.may_share(node)
            own.append(
                self.copy(result, node.meta["value"].shape, node.meta["value"].dtype) if borrowed else result
            )
        return own

    def _updates(self) -> list[relax.Expr]:
        """The states as the call leaves them. One that was not updated in place is written at the end."""
        moved = {name: n for name, n in self.function.updates.items() if self.memory.of(n) != name}
        # what is read from another state must be read before that one is written
        sources = {
            name: self.copy(self.value(n), n.meta["value"].shape, n.meta["value"].dtype)
            if self.memory.may_share(n)
            else self.value(n)
            for name, n in moved.items()
        }
        written = []
        for name, node in self.function.updates.items():
            if name not in moved:
                written.append(self.value(node))
                continue
            shape, dtype = node.meta["value"].shape, node.meta["value"].dtype
            state = self._values[self.function.state_nodes[name]]
            written.append(self.call(copy_kernel(shape, dtype), [sources[name]], [shape], into=state))
        return written

    # -- what rules use

    def define(self, node: fx.Node, value: relax.Expr) -> None:
        """The value of a node: that being lowered, or one of its tail (`fusion.Tail`) that its kernel computes too."""
        self._values[node] = value
        self.memory.made(node)

    def value(self, node: fx.Node) -> relax.Expr:
        """The Relax value of a node; a parameter is read in its plain layout."""
        if node.op == "get_attr":
            return self.weight(Weight((node.target,)))
        return self._values[node]

    def witness(self, symbol: str) -> fx.Node:
        """An input of which one dimension is the symbol: every named dimension is read off some input."""
        dim = Dim.symbol(symbol)
        return next(n for n in self.function.input_nodes if dim in n.meta["value"].shape)

    def view(self, node: fx.Node, shape: Shape) -> relax.Expr:
        """The value of a node in a shape that differs from its own in dimensions of size one at most."""
        own = node.meta["value"].shape
        if len(shape) == len(own):
            return self.value(node)
        sizes = iter(d for d in own if d != 1)  # kernels have names of their own for compound dimensions
        return self.reshape(self.value(node), tuple(1 if d == 1 else next(sizes) for d in shape))

    def weight(self, weight: Weight) -> relax.Var:
        """The function parameter that holds a stored weight in some layout; equal weights share one."""
        if weight not in self.weights:
            spec = weight.spec(self.function.parameters)
            self.weights[weight] = relax.Var(weight.name, relax.TensorType(spec.shape, spec.dtype))
        return self.weights[weight]

    def gemm(self, anchor: fx.Node, n: int, chain: Chain, weights: int = 1) -> Gemm:
        """The kernel for linear layers of one input, in the layout that the target reads."""
        value, weight = (
            x.meta["value"] for x in (self.plan.left_matrix(anchor), fusion.stored_weight(anchor))
        )
        *lead, k = value.shape
        stored = weight.dtype if (value.dtype, weight.dtype) == ("float32", "float16") else None
        return Gemm(
            opaque(tuple(lead)), k, n, chain, tiles.panel_width(self.target), weights, value.dtype,
            self.words(anchor), stored, _groups(anchor),
        )  # fmt: skip

    def words(self, anchor: fx.Node) -> Words | None:
        """How the weights of a linear layer are packed (`Gemm.words`)."""
        return stored_words(self.plan.left_matrix(anchor).meta["value"].dtype, self.target, _groups(anchor))

    def operands(self, anchor: fx.Node, gemm: Gemm, weight: relax.Expr) -> list[relax.Expr]:
        """A linear layer's input as its kernel reads it, the packed weight, and scales where the kernel has them."""
        scales = fusion.scales_of(anchor)
        return [self._left(anchor, gemm), weight, *([self.value(scales)] if scales else [])]

    def _left(self, anchor: fx.Node, gemm: Gemm) -> relax.Expr:
        x = self.plan.left_matrix(anchor)
        if not gemm.prepares:
            return self.value(x)
        *lead, k = x.meta["value"].shape
        made = prepared(tuple(lead), k, gemm.words, gemm.dtype)
        kernel = Prepare(gemm.lead, k, gemm.words, gemm.dtype)
        return self.call(kernel, [self.value(x)], [made.shape])

    def call(
        self,
        kernel: Kernel,
        args: Sequence[relax.Expr],
        shapes: Sequence[Shape] | None = None,
        into: relax.Expr | None = None,
        of: Sequence[fx.Node] = (),
    ) -> Any:
        """Calls a kernel; ``shapes`` are the outputs' true shapes (default: as the kernel says).

        ``into``: memory that the kernel's one output is written to, instead of new memory; what it held is gone.
        ``of``: the nodes that its time is spent on, where they are not the one being lowered.
        Returns the output, or a list where the kernel has several.
        """
        kernels = self._lowered.kernels
        if kernel not in kernels:
            # the module's own name for it becomes the symbol: two kernels may suggest the same one
            function = kernel.build(self.target).without_attr("global_symbol")
            kernels[kernel] = self._builder.add_func(function, kernel.name()).name_hint
        handle = self._builder.get().get_global_var(kernels[kernel])
        self._lowered.origins.append((kernel, tuple(of) or self._current))
        outputs = kernel.outputs()
        types = [
            relax.TensorType(self.shape(shape), spec.dtype)
            for spec, shape in zip(outputs, shapes or [o.shape for o in outputs], strict=True)
        ]
        if into is not None:
            return self._builder.emit(
                relax.call_tir_inplace(handle, relax.Tuple([*args, into]), [len(args)], types)
            )
        result = self._builder.emit(
            relax.call_tir(handle, relax.Tuple(list(args)), types if len(types) > 1 else types[0])
        )
        if len(types) == 1:
            return result
        return [self._builder.emit(relax.TupleGetItem(result, i)) for i in range(len(types))]

    def reshape(self, x: relax.Expr, shape: Shape) -> relax.Expr:
        """The same memory seen in another shape; no code runs."""
        return self._builder.emit(relax.op.reshape(x, self.shape(shape)))

    def copy(self, x: relax.Expr, shape: Shape, dtype: str) -> relax.Expr:
        """The same contents in memory of their own."""
        return self.call(copy_kernel(opaque(shape), dtype), [x], [shape])

    def shape(self, shape: Shape) -> list[Any]:
        """A shape over Relax's variables."""
        return [d.evaluate(self._dims) if isinstance(d, Dim) else d for d in shape]

    def type(self, value: Any) -> relax.TensorType:
        return relax.TensorType(self.shape(value.shape), value.dtype)


def copy_kernel(shape: Shape, dtype: str, output: Shape | None = None) -> Elementwise:
    """Writes its input to new memory, repeated along the dimensions of ``output`` where it has size 1."""
    return Elementwise(Chain((ChainInput("full", dtype),), (), (0,)), (shape,), output or shape)


def opaque(shape: Shape) -> Shape:
    """A shape whose compound dimensions are symbols of their own (``batch*length`` -> ``batch_x_length``).

    Kernels bind each symbol from a dimension of an argument, so they see no arithmetic; it also lets functions
    that spell a dimension differently share a kernel.
    """
    return tuple(Dim.symbol(_identifier(d)) if isinstance(d, Dim) and not d.is_symbol else d for d in shape)


def _identifier(dim: Dim) -> str:
    text = str(dim)
    for old, new in (("**", "_pow_"), ("*", "_x_"), (" + ", "_plus_"), (" - ", "_minus_"), ("-", "minus_")):
        text = text.replace(old, new)
    return f"size_{text}"
