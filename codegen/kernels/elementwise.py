"""A chain of element-wise operations over N-d arrays that broadcast to one shape."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm import tirx
from tvm.ir import Expr

from tersor.codegen.kernels import loops
from tersor.codegen.kernels.arguments import function
from tersor.codegen.kernels.base import TensorSpec
from tersor.codegen.kernels.chain import Chain
from tersor.codegen.kernels.evaluate import evaluate_chain, output_dtypes
from tersor.codegen.kernels.math import cast
from tersor.ir.dims import Shape, product
from tersor.targets import Target

CHUNK = 8192
"""Elements that a thread takes at a time when no dimension is left to split."""


@dataclass(frozen=True)
class Elementwise:
    """``outputs = chain(*inputs)`` where every input broadcasts to ``output`` (its missing leading dims are 1).

    ``shapes[i]`` belongs to ``chain.inputs[i]``, whose kind is not looked at: the shape says how it broadcasts.
    All outputs have the shape ``output``.
    ValueError when a shape does not broadcast.
    """

    chain: Chain
    shapes: tuple[Shape, ...]
    output: Shape

    def __post_init__(self) -> None:
        if len(self.shapes) != len(self.chain.inputs):
            raise ValueError(f"{len(self.shapes)} shapes for {len(self.chain.inputs)} inputs of the chain")
        for shape in self.shapes:
            _pattern(shape, self.output)

    def name(self) -> str:
        return "elementwise_" + (self.chain.label() or "copy")

    def inputs(self) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(s, v.dtype) for s, v in zip(self.shapes, self.chain.inputs, strict=True))

    def outputs(self) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(self.output, dtype) for dtype in output_dtypes(self.chain))

    def build(self, target: Target) -> tirx.PrimFunc:
        lanes = target.lanes("float32")
        with function(self.name()) as (builder, arguments):
            inputs = [arguments.declare(f"in_{i}", spec) for i, spec in enumerate(self.inputs())]
            outputs = [arguments.declare(f"out_{i}", spec) for i, spec in enumerate(self.outputs())]
            groups = loops.merge_dims(self.output, [_pattern(s, self.output) for s in self.shapes])
            extents = [arguments.size(dims) for dims, _ in groups]
            moves = list(zip(*(along for _, along in groups), strict=True))
            sources = [(loops.flat(b), m) for b, m in zip(inputs, moves, strict=True)]
            results = [loops.flat(b) for b in outputs]

            def vector(position: list[Expr], where: Expr | None) -> None:
                values = []
                for (buffer, along), chain_input in zip(sources, self.chain.inputs, strict=True):
                    at = loops.ravel(position, extents, along)
                    value = loops.load(buffer, at, lanes, where) if along[-1] else buffer[at]
                    values.append(cast(value, chain_input.dtype))
                at = loops.ravel(position, extents)
                for buffer, value in zip(results, evaluate_chain(self.chain, values, target), strict=True):
                    loops.store(buffer, at, cast(value, buffer.dtype), lanes, where)

            work = product(extents) * (1 + len(self.chain.steps) // 4)
            _nest(extents, work, lanes, vector)
        return builder.get()


def _pattern(shape: Shape, output: Shape) -> tuple[bool, ...]:
    """For each dimension of the output, whether an input of this shape moves along it; ValueError if it cannot."""
    padded = (1,) * (len(output) - len(shape)) + tuple(shape)
    if len(padded) != len(output) or any(a != b and a != 1 for a, b in zip(padded, output, strict=True)):
        raise ValueError(f"{_spell(shape)} does not broadcast to {_spell(output)}")
    return tuple(size != 1 for size in padded)


def _spell(shape: Shape) -> str:
    return f"({', '.join(map(str, shape))})"


def _nest(
    extents: list[loops.Extent],
    work: loops.Extent,
    lanes: int,
    vector: Callable[[list[Expr], Expr | None], None],
) -> None:
    """All vectors of the index space: the outer extents as one loop over threads, the last one in vectors."""
    *outer, last = extents
    if outer:

        def row(index: Expr) -> None:
            position = loops.unravel(index, outer)
            loops.vectors(last, lanes, lambda at, where: vector([*position, at], where))

        loops.rows(product(outer), work, row)
        return

    def chunk(index: Expr) -> None:
        start = index * CHUNK
        size = tirx.min(CHUNK, last - start)
        loops.vectors(size, lanes, lambda at, where: vector([start + at], where))

    if isinstance(last, int) and last <= CHUNK:
        loops.vectors(last, lanes, lambda at, where: vector([at], where))
    else:
        loops.rows(tirx.floordiv(last + (CHUNK - 1), CHUNK), work, chunk)
