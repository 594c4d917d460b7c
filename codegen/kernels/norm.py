"""Normalisation over the last dimension, with the residual sum before it in the same pass over memory; reductions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from tersor.codegen.kernels import loops, math
from tersor.codegen.kernels.arguments import function
from tersor.codegen.kernels.base import TensorSpec
from tersor.codegen.kernels.chain import PLAIN, Chain, ChainInput
from tersor.codegen.kernels.evaluate import evaluate_chain, output_dtypes
from tersor.codegen.kernels.quantize import RowResults, operand_specs, operands, row_specs
from tersor.ir.dims import Shape, product
from tersor.targets import Target

IDENTITY = Chain((ChainInput("full"),), (), (0,))

SUMS = 4
"""Independent partial sums of a row, to hide the latency of an addition."""

Lanes = Callable[[loops.Extent, Expr | None], Expr]
"""A vector of a row's values at an offset; lanes outside the mask are arbitrary."""


@dataclass(frozen=True)
class _Norm(ABC):
    """What both norms share: arguments, the input chain, and the passes over a row that stays in L1."""

    lead: Shape
    size: int
    eps: float = 1e-5
    weight: bool = True
    bias: bool = True
    chain: Chain = IDENTITY
    keep_input: bool = False
    epilogue: Chain = PLAIN
    quantized: bool = False

    label: ClassVar[str]

    def __post_init__(self) -> None:
        if len(self.chain.outputs) != 1 or output_dtypes(self.chain) != ("float32",):
            raise ValueError("the input chain of a norm has one f32 output")
        kinds = [value.kind for value in self.epilogue.inputs]
        if kinds[:1] != ["accumulator"] or kinds.count("accumulator") > 1:
            raise ValueError(f"the epilogue of a norm starts from one accumulator: {kinds}")
        if self.quantized and output_dtypes(self.epilogue)[:1] != ("float32",):
            raise ValueError("what is quantized row by row is f32")

    def name(self) -> str:
        parts = [self.label, str(self.size), self.chain.label(), "keep" if self.keep_input else ""]
        parts += [self.epilogue.label(), "quantized" if self.quantized else ""]
        return "_".join(part for part in parts if part)

    def inputs(self) -> tuple[TensorSpec, ...]:
        vector = TensorSpec((self.size,))
        return (
            *operand_specs(self.chain.inputs, self.lead, self.size),
            *((vector,) if self.weight else ()),
            *((vector,) if self.bias else ()),
            *operand_specs(self.epilogue.inputs[1:], self.lead, self.size),
        )

    def outputs(self) -> tuple[TensorSpec, ...]:
        results = row_specs(self.epilogue, self.lead, self.size, self.quantized)
        return (*results, *((TensorSpec((*self.lead, self.size)),) if self.keep_input else ()))

    def build(self, target: Target) -> tirx.PrimFunc:
        with function(self.name()) as (builder, arguments):
            inputs = [arguments.declare(f"in_{i}", spec) for i, spec in enumerate(self.inputs())]
            outputs = [arguments.declare(f"out_{i}", spec) for i, spec in enumerate(self.outputs())]
            inputs, outputs = [loops.flat(b) for b in inputs], [loops.flat(b) for b in outputs]
            count = arguments.size(self.lead)
            loops.rows(count, count * self.size, lambda row: self._row(row, inputs, outputs, target))
        return builder.get()

    def _row(self, row: Expr, inputs: list, outputs: list, target: Target) -> None:
        lanes = target.lanes("float32")
        start = row * self.size
        count, rest = len(self.chain.inputs), inputs[len(self.chain.inputs) :]
        weight = rest.pop(0) if self.weight else None
        bias = rest.pop(0) if self.bias else None
        written = outputs[:-1] if self.keep_input else outputs
        if self.keep_input:
            source, at = outputs[-1], start
        elif self.chain == IDENTITY:
            source, at = inputs[0], start
        else:
            source, at = T.alloc_buffer((-(-self.size // lanes) * lanes,)), 0

        def value(offset: loops.Extent, where: Expr | None) -> Expr:
            """The chain's value, computed and kept for the later passes."""
            if source is inputs[0]:
                return loops.load(source, start + offset, lanes, where)
            values = operands(self.chain.inputs, inputs[:count], row, self.size, offset, lanes, where)
            (result,) = evaluate_chain(self.chain, values, target)
            loops.store(source, at + offset, result, lanes, where)
            return result

        def kept(offset: loops.Extent, where: Expr | None) -> Expr:
            return loops.load(source, at + offset, lanes, where)

        center, scale = self._statistics(value, kept, lanes)
        results = RowResults(self.size, lanes, written, row, self.quantized)

        def finish(offset: loops.Extent, where: Expr | None) -> None:
            x = kept(offset, where)
            x = (x if center is None else x - center) * scale
            if weight is not None:
                x = x * loops.load(weight, offset, lanes, where)
            if bias is not None:
                x = x + loops.load(bias, offset, lanes, where)
            values = [x, *operands(self.epilogue.inputs[1:], rest, row, self.size, offset, lanes, where)]
            results.put(offset, evaluate_chain(self.epilogue, values, target), where)

        loops.vectors(self.size, lanes, finish)
        results.finish()

    @abstractmethod
    def _statistics(self, value: Lanes, kept: Lanes, lanes: int) -> tuple[Expr | None, Expr]:
        """The row's centre (None: zero) and the factor that brings it to unit scale, as vectors.

        ``value`` must be called for the whole row before ``kept``, which reads back what it computed.
        """


@dataclass(frozen=True)
class LayerNorm(_Norm):
    """``y = (x - mean) / sqrt(variance + eps) * weight + bias`` over the last dimension, in f32; x = chain(*inputs).

    ``lead`` are the other dimensions, ``size`` the last one. ``epilogue`` is a chain from y (its accumulator) and
    further inputs to the outputs, for example codes. ``quantized``: the first of these, f32, is quantized with a scale
    for every row as `DynamicQuantize` does, and its codes and scales are written instead of it.

    Arguments: the chain's inputs in order ("full" [*lead, size], "column" [size], "row" [*lead, 1], "scalar" ()),
    weight [size] and bias [size] where present, the epilogue's other inputs; then the epilogue's outputs [*lead, size]
    (codes uint8 [*lead, size] and scale [*lead, 1] for the first, if quantized), and x itself where ``keep_input`` asks
    for it (a residual stream needs both).
    The variance is computed from the centred values, so a large mean costs no digits.
    ValueError when chain and epilogue are not of these forms.
    """

    label: ClassVar[str] = "layer_norm"

    def _statistics(self, value: Lanes, kept: Lanes, lanes: int) -> tuple[Expr, Expr]:
        mean = math.bind(math.broadcast(_row_sum(self.size, lanes, value) * (1 / self.size), lanes))

        def squared(offset: loops.Extent, where: Expr | None) -> Expr:
            centred = math.bind(kept(offset, where) - mean)
            return centred * centred

        return mean, _inverse_root(_row_sum(self.size, lanes, squared) * (1 / self.size) + self.eps, lanes)


@dataclass(frozen=True)
class RMSNorm(_Norm):
    """``x / sqrt(mean(x**2) + eps) * weight + bias``; otherwise like LayerNorm."""

    label: ClassVar[str] = "rms_norm"

    def _statistics(self, value: Lanes, kept: Lanes, lanes: int) -> tuple[None, Expr]:
        def squared(offset: loops.Extent, where: Expr | None) -> Expr:
            x = math.bind(value(offset, where))
            return x * x

        return None, _inverse_root(_row_sum(self.size, lanes, squared) * (1 / self.size) + self.eps, lanes)


@dataclass(frozen=True)
class Reduce:
    """Sum, mean, maximum or minimum over the dimensions ``dims`` (not negative, any order) of an array.

    The output has the other dimensions; with ``keepdims`` also the reduced ones, of size 1. NaN in a maximum or
    minimum stays. A mean is f32. ValueError for a dimension that is not there.
    """

    op: Literal["sum", "mean", "max", "min"]
    shape: Shape
    dims: tuple[int, ...]
    keepdims: bool = False
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if not self.dims or not all(0 <= d < len(self.shape) for d in self.dims):
            raise ValueError(f"cannot reduce dimensions {self.dims} of {len(self.shape)}")

    def name(self) -> str:
        return f"reduce_{self.op}"

    def inputs(self) -> tuple[TensorSpec, ...]:
        return (TensorSpec(self.shape, self.dtype),)

    def outputs(self) -> tuple[TensorSpec, ...]:
        kept = enumerate(self.shape)
        shape = tuple(1 if d in self.dims else n for d, n in kept if self.keepdims or d not in self.dims)
        return (TensorSpec(shape, "float32" if self.op == "mean" else self.dtype),)

    def build(self, target: Target) -> tirx.PrimFunc:
        lanes = target.lanes("float32")
        with function(self.name()) as (builder, arguments):
            source = arguments.declare("x", self.inputs()[0])
            result = arguments.declare("out", self.outputs()[0])
            source, result = loops.flat(source), loops.flat(result)
            groups = loops.merge_dims(self.shape, [tuple(d not in self.dims for d in range(len(self.shape)))])
            self._schedule(source, result, [(arguments.size(dims), kept) for dims, (kept,) in groups], lanes)
        return builder.get()

    def _schedule(self, source: tirx.Buffer, result: tirx.Buffer, groups: list, lanes: int) -> None:
        extents = [extent for extent, _ in groups]
        last, last_kept = groups[-1]
        outer = [extent for extent, kept in groups[:-1] if kept]
        inner = [extent for extent, kept in groups[:-1] if not kept]

        def start(row: Expr, step: Expr) -> loops.Extent:
            """Where the last group begins, for an element of the outer kept and the outer reduced groups."""
            kept_at, reduced_at = iter(loops.unravel(row, outer)), iter(loops.unravel(step, inner))
            position = [next(kept_at if kept else reduced_at) for _, kept in groups[:-1]]
            return loops.ravel([*position, 0], extents)

        def column(row: Expr) -> None:
            def vector(at: loops.Extent, where: Expr | None) -> None:
                total = self._accumulator(lanes)
                with T.serial(product(inner)) as step:
                    self._accumulate(total, loops.load(source, start(row, step) + at, lanes, where), None)
                loops.store(
                    result, row * last + at, self._finished(total[T.ramp(0, 1, lanes)], inner), lanes, where
                )

            loops.vectors(last, lanes, vector)

        def line(row: Expr) -> None:
            total = self._accumulator(lanes)
            with T.serial(product(inner)) as step:
                begin = start(row, step)
                loops.vectors(
                    last,
                    lanes,
                    lambda at, where: self._accumulate(
                        total, loops.load(source, begin + at, lanes, where), where
                    ),
                )
            value = math.horizontal(self._combine, total[T.ramp(0, 1, lanes)])
            T.buffer_store(result, self._finished(value, [*inner, last]), [row])

        loops.rows(product(outer), product(extents), column if last_kept else line)

    def _combine(self, a: Expr, b: Expr) -> Expr:
        return {"max": math.maximum, "min": math.minimum}.get(self.op, lambda a, b: a + b)(a, b)

    def _stored(self) -> str:
        """The dtype of the computation: bools are bytes in memory."""
        return "int8" if self.dtype == "bool" else self.dtype

    def _identity(self) -> float | int:
        if self.op in ("sum", "mean"):
            return 0
        largest = {"float32": float("inf"), "bool": 1}.get(self.dtype) or 2 ** (int(self.dtype[3:]) - 1) - 1
        return largest if self.op == "min" else 0 if self.dtype == "bool" else -largest

    def _accumulator(self, lanes: int) -> tirx.Buffer:
        total = T.alloc_buffer((lanes,), self._stored())
        loops.store(total, 0, tirx.const(self._identity(), self._stored()), lanes)
        return total

    def _accumulate(self, total: tirx.Buffer, value: Expr, where: Expr | None) -> None:
        at = T.ramp(0, 1, total.shape[0])
        if where is not None:
            value = tirx.Select(where, value, math.constant(self._identity(), value))
        T.buffer_store(total, self._combine(total[at], value), [at])

    def _finished(self, value: Expr, extents: list[loops.Extent]) -> Expr:
        if self.op != "mean":
            return value
        count = tirx.Cast("float32", tirx.convert(product(extents)))
        return math.cast(value, "float32") / math.broadcast(count, math.lanes_of(value))


def _row_sum(size: int, lanes: int, value: Lanes) -> Expr:
    """The sum of a row's values, in several partial sums."""
    full, rest = divmod(size, lanes)
    totals = T.alloc_buffer((SUMS, lanes))
    at = T.ramp(0, 1, lanes)
    for j in range(SUMS):
        T.buffer_store(totals, tirx.const(0.0, f"float32x{lanes}"), [j, at])

    def add(j: int, offset: loops.Extent, where: Expr | None = None) -> None:
        term = value(offset, where)
        if where is not None:
            term = tirx.Select(where, term, math.constant(0.0, term))
        T.buffer_store(totals, totals[j, at] + term, [j, at])

    if full >= SUMS:
        with T.serial(full // SUMS) as i:
            for j in range(SUMS):
                add(j, (i * SUMS + j) * lanes)
    for j in range(full % SUMS):
        add(j, (full // SUMS * SUMS + j) * lanes)
    if rest:
        add(full % SUMS, full * lanes, loops.mask(rest, lanes))
    pairs = [totals[j, at] + totals[j + 1, at] for j in range(0, SUMS, 2)]
    return math.horizontal(lambda a, b: a + b, sum(pairs[1:], pairs[0]))


def _inverse_root(x: Expr, lanes: int) -> Expr:
    return math.bind(math.broadcast(1.0 / tirx.sqrt(x), lanes))
