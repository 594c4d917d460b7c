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
from tersor.codegen.kernels.quantize import RowResults, check_scales, operand_specs, operands, row_specs
from tersor.codegen.kernels.reduction import Lanes, plus, reduce
from tersor.codegen.tiles import CACHE_LINE
from tersor.ir.dims import Shape, product
from tersor.targets import Target

IDENTITY = Chain((ChainInput("full"),), (), (0,))

SUMS = 64
"""Partial sums of a row, in several vectors to hide the latency of an addition."""

ROWS = 4
"""Rows that are normalised together: others are summed up while the partial sums of one are folded."""

RowLanes = Callable[[Expr], Lanes]
"""`Lanes` of a row, arbitrary outside the mask."""


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
    scales: int = 0

    label: ClassVar[str]

    def __post_init__(self) -> None:
        if len(self.chain.outputs) != 1 or output_dtypes(self.chain) != ("float32",):
            raise ValueError("the input chain of a norm has one f32 output")
        kinds = [value.kind for value in self.epilogue.inputs]
        if kinds[:1] != ["accumulator"] or kinds.count("accumulator") > 1:
            raise ValueError(f"the epilogue of a norm starts from one accumulator: {kinds}")
        if self.scales:
            check_scales(self.epilogue, self.size, self.scales)

    def name(self) -> str:
        parts = [self.label, str(self.size), self.chain.label(), "keep" if self.keep_input else ""]
        parts += [self.epilogue.label(), f"scales_{self.scales}" if self.scales else ""]
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
        results = row_specs(self.epilogue, self.lead, self.size, self.scales)
        return (*results, *((TensorSpec((*self.lead, self.size)),) if self.keep_input else ()))

    def build(self, target: Target) -> tirx.PrimFunc:
        with function(self.name()) as (builder, arguments):
            inputs = [arguments.declare(f"in_{i}", spec) for i, spec in enumerate(self.inputs())]
            outputs = [arguments.declare(f"out_{i}", spec) for i, spec in enumerate(self.outputs())]
            inputs, outputs = [loops.flat(b) for b in inputs], [loops.flat(b) for b in outputs]
            count = arguments.size(self.lead)
            height = min(ROWS, count) if isinstance(count, int) else ROWS

            def block(index: Expr) -> None:
                self._rows(index * height, height, count, inputs, outputs, target)

            loops.rows(-(-count // height), count * self.size, block)
        return builder.get()

    def _rows(
        self,
        first: Expr,
        height: int,
        count: loops.Extent,
        inputs: list[tirx.Buffer],
        outputs: list[tirx.Buffer],
        target: Target,
    ) -> None:
        """Up to ``height`` rows from the first one on, of ``count`` in all; one pass after the other over all of them,
        as each waits for what came of the one before it."""
        lanes, size = target.lanes("float32"), self.size
        inner, rest = inputs[: len(self.chain.inputs)], inputs[len(self.chain.inputs) :]
        weight = rest.pop(0) if self.weight else None
        bias = rest.pop(0) if self.bias else None
        written = outputs[:-1] if self.keep_input else outputs
        stride = size
        if self.keep_input:
            source, base = outputs[-1], first * size
        elif self.chain == IDENTITY:
            source, base = inputs[0], first * size
        else:
            stride, base = -(-size // lanes) * lanes, 0
            source = T.alloc_buffer((height * stride,))
        exact = isinstance(count, int) and count % height == 0
        rows = height if exact else tirx.min(height, count - first)

        def value(r: Expr) -> Lanes:
            """The chain's values, computed and kept for the later passes."""

            def lane(offset: loops.Extent, where: Expr | None) -> Expr:
                if source is inputs[0]:
                    return loops.load(source, base + r * stride + offset, lanes, where)
                values = operands(self.chain.inputs, inner, first + r, size, offset, lanes, where)
                (result,) = evaluate_chain(self.chain, values, target)
                loops.store(source, base + r * stride + offset, result, lanes, where)
                return result

            return lane

        def kept(r: Expr) -> Lanes:
            return lambda offset, where: loops.load(source, base + r * stride + offset, lanes, where)

        # narrow vectors would fetch every line several times
        ahead = lanes * 4 == CACHE_LINE
        center, scale = self._statistics(rows, height, value, kept, lanes)
        with T.serial(rows) as r:
            x, row = kept(r), first + r
            middle = None if center is None else math.bind(math.broadcast(center[r], lanes))
            factor = math.bind(math.broadcast(scale[r], lanes))
            results = RowResults(size, lanes, written, row, self.scales)

            def finish(offset: loops.Extent, where: Expr | None) -> None:
                if ahead:
                    for operand, buffer in zip(self.chain.inputs, inner, strict=True):
                        if operand.kind == "full":
                            loops.prefetch(buffer, (row + height) * size + offset)
                y = x(offset, where)
                y = (y if middle is None else y - middle) * factor
                if weight is not None:
                    y = y * loops.load(weight, offset, lanes, where)
                if bias is not None:
                    y = y + loops.load(bias, offset, lanes, where)
                values = [y, *operands(self.epilogue.inputs[1:], rest, row, size, offset, lanes, where)]
                results.put(offset, evaluate_chain(self.epilogue, values, target), where)

            loops.vectors(size, lanes, finish)
            results.finish()

    @abstractmethod
    def _statistics(
        self, rows: loops.Extent, height: int, value: RowLanes, kept: RowLanes, lanes: int
    ) -> tuple[tirx.Buffer | None, tirx.Buffer]:
        """The centres of ``rows <= height`` rows (None: zero) and the factors that bring them to unit scale.

        ``value(r)`` must be called for the whole of a row before ``kept(r)``, which reads back what it computed.
        """


@dataclass(frozen=True)
class LayerNorm(_Norm):
    """``y = (x - mean) / sqrt(variance + eps) * weight + bias`` over the last dimension, in f32; x = chain(*inputs).

    ``lead`` are the other dimensions, ``size`` the last one. ``epilogue`` is a chain from y (its accumulator) and
    further inputs to the outputs, for example codes. ``scales``: the first of these, f32, is quantized with so
    many scales for every row as `DynamicQuantize` does, and its codes and scales are written instead of it.

    Arguments: the chain's inputs in order ("full" [*lead, size], "column" [size], "row" [*lead, 1], "scalar" ()),
    weight [size] and bias [size] where present, the epilogue's other inputs; then the epilogue's outputs [*lead, size]
    (codes uint8 [*lead, size] and scales [*lead, scales] for the first, if there are scales), and x itself where
    ``keep_input`` asks for it (a residual stream needs both).
    The variance is computed from the centred values, so a large mean costs no digits.
    ValueError when chain and epilogue are not of these forms.
    """

    label: ClassVar[str] = "layer_norm"

    def _statistics(
        self, rows: loops.Extent, height: int, value: RowLanes, kept: RowLanes, lanes: int
    ) -> tuple[tirx.Buffer, tirx.Buffer]:
        means, factors = _numbers(height), _numbers(height)
        with T.serial(rows) as r:
            T.buffer_store(means, _mean(self.size, lanes, value(r)), [r])
        with T.serial(rows) as r:
            x, mean = kept(r), math.bind(math.broadcast(means[r], lanes))
            variance = _mean_square(self.size, lanes, lambda offset, where: x(offset, where) - mean)
            T.buffer_store(factors, 1.0 / tirx.sqrt(variance + self.eps), [r])
        return means, factors


@dataclass(frozen=True)
class RMSNorm(_Norm):
    """``x / sqrt(mean(x**2) + eps) * weight + bias``; otherwise like LayerNorm."""

    label: ClassVar[str] = "rms_norm"

    def _statistics(
        self, rows: loops.Extent, height: int, value: RowLanes, kept: RowLanes, lanes: int
    ) -> tuple[None, tirx.Buffer]:
        factors = _numbers(height)
        with T.serial(rows) as r:
            T.buffer_store(factors, 1.0 / tirx.sqrt(_mean_square(self.size, lanes, value(r)) + self.eps), [r])
        return None, factors


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
                    self._accumulate(total, loops.load(source, start(row, step) + at, lanes, where))
                loops.store(
                    result, row * last + at, self._finished(total[T.ramp(0, 1, lanes)], inner), lanes, where
                )

            loops.vectors(last, lanes, vector)

        def line(row: Expr) -> None:
            neutral = tirx.const(self._identity(), self._stored())
            total = self._accumulator(1)
            with T.serial(product(inner)) as step:
                begin = start(row, step)

                def value(at: loops.Extent, where: Expr | None) -> Expr:
                    loaded = loops.load(source, begin + at, lanes, where)
                    return (
                        loaded
                        if where is None
                        else tirx.Select(where, loaded, math.broadcast(neutral, lanes))
                    )

                found = reduce(*loops.split(last, lanes), lanes, value, self._combine, neutral)
                self._accumulate(total, found)
            T.buffer_store(result, self._finished(total[0], [*inner, last]), [row])

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
        total = T.alloc_buffer((lanes,), self._stored(), scope="global")
        start = tirx.const(self._identity(), self._stored())
        T.buffer_store(total, math.broadcast(start, lanes), [_whole(total)])
        return total

    def _accumulate(self, total: tirx.Buffer, value: Expr) -> None:
        at = _whole(total)
        T.buffer_store(total, self._combine(total[at], value), [at])

    def _finished(self, value: Expr, extents: list[loops.Extent]) -> Expr:
        if self.op != "mean":
            return value
        count = tirx.Cast("float32", tirx.convert(product(extents)))
        return math.cast(value, "float32") / math.broadcast(count, math.lanes_of(value))


def _mean(size: int, lanes: int, x: Lanes) -> Expr:
    """That of a row's values."""
    return _sum(size, lanes, lambda offset, where: _masked(x(offset, where), where)) * (1 / size)


def _mean_square(size: int, lanes: int, x: Lanes) -> Expr:
    """That of a row's values. They, not their squares, are 0 outside the mask: a square and a sum are one operation
    then too."""

    def square(offset: loops.Extent, where: Expr | None) -> Expr:
        value = math.bind(_masked(x(offset, where), where))
        return value * value

    return _sum(size, lanes, square) * (1 / size)


def _sum(size: int, lanes: int, terms: Lanes) -> Expr:
    return reduce(*loops.split(size, lanes), lanes, terms, plus, tirx.const(0.0, "float32"), SUMS)


def _masked(x: Expr, where: Expr | None) -> Expr:
    """Zero outside the mask."""
    return x if where is None else tirx.Select(where, x, math.constant(0.0, x))


def _whole(buffer: tirx.Buffer) -> Expr | int:
    """The index of all that a small buffer holds."""
    lanes = int(buffer.shape[0])
    return T.ramp(0, 1, lanes) if lanes > 1 else 0


def _numbers(count: int) -> tirx.Buffer:
    return T.alloc_buffer((count,), scope="global")
