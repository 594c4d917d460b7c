"""Dynamic quantization: symmetric 8-bit codes with scales for every row, alone or at the end of a norm."""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from tersor.codegen.kernels import loops, math
from tersor.codegen.kernels.arguments import function
from tersor.codegen.kernels.base import TensorSpec
from tersor.codegen.kernels.chain import Chain, ChainInput
from tersor.codegen.kernels.evaluate import evaluate_chain, output_dtypes
from tersor.ir.dims import Shape
from tersor.ir.opset.quantization import SMALLEST_GROUP
from tersor.targets import Target

ZERO_POINT = 128.0
"""What the code of 0 is: codes of activations are unsigned."""

LARGEST = 127
"""The code of the largest magnitude of a row, less the zero point."""

MAGNITUDE = 0x7FFFFFFF
"""The bits of an f32 without its sign. As integers they are ordered like the magnitudes, with NaN above all."""


@dataclass(frozen=True)
class DynamicQuantize:
    """Per-token quantization of ``x = chain(*inputs)``, as `dynamic_scale` and `quantize` of the dialect define it.

    scale = max |x| / 127 over each of ``scales`` equal parts of the last dimension, 1 for zeros;
    codes = saturate(round(x * (1 / scale)) + 128). A NaN makes its scale NaN.

    Arguments: the chain's inputs in order ("full" [*lead, size], "column" [size], "row" [*lead, 1], "scalar" ());
    codes uint8 [*lead, size], scale f32 [*lead, scales], then the chain's outputs but the first, which is x.
    ValueError when x is not f32, or several parts do not consist of whole `SMALLEST_GROUP`s.
    """

    lead: Shape
    size: int
    chain: Chain = Chain((ChainInput("full"),), (), (0,))
    scales: int = 1

    def __post_init__(self) -> None:
        check_scales(self.chain, self.size, self.scales)

    def name(self) -> str:
        parts = ["dynamic_quantize", str(self.size), f"g{self.scales}" if self.scales > 1 else ""]
        return "_".join(part for part in (*parts, self.chain.label()) if part)

    def inputs(self) -> tuple[TensorSpec, ...]:
        return operand_specs(self.chain.inputs, self.lead, self.size)

    def outputs(self) -> tuple[TensorSpec, ...]:
        return row_specs(self.chain, self.lead, self.size, self.scales)

    def build(self, target: Target) -> tirx.PrimFunc:
        lanes = target.lanes("float32")
        with function(self.name()) as (builder, arguments):
            inputs = [arguments.declare(f"in_{i}", spec) for i, spec in enumerate(self.inputs())]
            outputs = [arguments.declare(f"out_{i}", spec) for i, spec in enumerate(self.outputs())]
            inputs, outputs = [loops.flat(b) for b in inputs], [loops.flat(b) for b in outputs]

            def row(index: Expr) -> None:
                results = RowResults(self.size, lanes, outputs, index, self.scales)

                def vector(offset: loops.Extent, where: Expr | None) -> None:
                    values = operands(self.chain.inputs, inputs, index, self.size, offset, lanes, where)
                    results.put(offset, evaluate_chain(self.chain, values, target), where)

                loops.vectors(self.size, lanes, vector)
                results.finish()

            rows = arguments.size(self.lead)
            loops.rows(rows, rows * self.size * 2, row)
        return builder.get()


class RowResults:
    """Where a kernel that works row by row puts its results, a vector of each at a time.

    With ``scales`` the first result is kept until the whole row is known; ``finish`` then writes its codes and so many
    scales to the first two of the (flat) outputs. The other results are stored at once.
    """

    def __init__(self, size: int, lanes: int, outputs: list[tirx.Buffer], row: Expr, scales: int) -> None:
        self.size, self.lanes, self.row, self.scales = size, lanes, row, scales
        self.outputs = outputs
        if scales:
            self.values = T.alloc_buffer((-(-size // lanes) * lanes,))
            self.highest = T.alloc_buffer((lanes,), "int32", scope="global")
            loops.store(self.highest, 0, tirx.const(0, "int32"), lanes)

    def put(self, offset: loops.Extent, results: list[Expr], where: Expr | None) -> None:
        """Results for the columns from ``offset`` on."""
        outputs = self.outputs
        if self.scales:
            value, *results = results
            value, outputs = math.bind(value), outputs[2:]
            loops.store(self.values, offset, value, self.lanes, where)
            if self.scales == 1:
                self._raise_highest(value, where)
        for output, result in zip(outputs, results, strict=True):
            at = self.row * self.size + offset
            loops.store(output, at, math.cast(result, output.dtype), self.lanes, where)

    def finish(self) -> None:
        """Call it after the last ``put``."""
        if self.scales == 1:
            self._encode(0)
        elif self.scales:
            with T.serial(self.scales) as part:
                loops.store(self.highest, 0, tirx.const(0, "int32"), self.lanes)
                first, size = part * (self.size // self.scales), self.size // self.scales
                loops.vectors(
                    size, self.lanes,
                    lambda at, where: self._raise_highest(loops.load(self.values, first + at, self.lanes), where),
                )  # fmt: skip
                self._encode(part)

    def _raise_highest(self, value: Expr, where: Expr | None) -> None:
        bits = tirx.reinterpret(f"int32x{self.lanes}", value)
        bits = tirx.bitwise_and(bits, math.constant(MAGNITUDE, bits))
        if where is not None:
            bits = tirx.Select(where, bits, math.constant(0, bits))
        loops.store(self.highest, 0, tirx.max(bits, loops.load(self.highest, 0, self.lanes)), self.lanes)

    def _encode(self, part: Expr | int) -> None:
        """Scale and codes of a part, of which the highest magnitudes are known."""
        codes, scales = self.outputs[:2]
        size = self.size // self.scales
        highest = math.horizontal(tirx.max, loops.load(self.highest, 0, self.lanes))
        scale = math.bind(tirx.reinterpret("float32", highest) * (1 / LARGEST))
        scale = math.bind(
            tirx.Select(tirx.EQ(scale, tirx.const(0.0, "float32")), tirx.const(1.0, "float32"), scale)
        )
        T.buffer_store(scales, scale, [self.row * self.scales + part])
        inverse = math.bind(math.broadcast(1.0 / scale, self.lanes))

        def quantize(offset: loops.Extent, where: Expr | None) -> None:
            at = part * size + offset
            value = math.round_even(loops.load(self.values, at, self.lanes, where) * inverse)
            code = math.saturate(value + ZERO_POINT, "uint8")
            loops.store(codes, self.row * self.size + at, code, self.lanes, where)

        loops.vectors(size, self.lanes, quantize)


def operand_specs(inputs: tuple[ChainInput, ...], lead: Shape, size: int) -> tuple[TensorSpec, ...]:
    """The arguments for inputs of a chain over rows [*lead, size]."""
    shapes = {"full": (*lead, size), "column": (size,), "row": (*lead, 1), "scalar": ()}
    return tuple(TensorSpec(shapes[value.kind], value.dtype) for value in inputs)


def row_specs(chain: Chain, lead: Shape, size: int, scales: int = 0) -> tuple[TensorSpec, ...]:
    """The arguments for the outputs of a chain over rows [*lead, size], in the order of `RowResults`."""
    dtypes = output_dtypes(chain)
    codes = (TensorSpec((*lead, size), "uint8"), TensorSpec((*lead, scales))) if scales else ()
    return (*codes, *(TensorSpec((*lead, size), dtype) for dtype in dtypes[min(scales, 1) :]))


def check_scales(chain: Chain, size: int, scales: int) -> None:
    """ValueError where rows of what a chain makes first cannot have so many scales."""
    if output_dtypes(chain)[:1] != ("float32",):
        raise ValueError("what is quantized row by row is f32")
    if scales > 1 and size % (scales * SMALLEST_GROUP):
        raise ValueError(f"{size} numbers are not {scales} parts of whole groups of {SMALLEST_GROUP}")


def operands(
    inputs: tuple[ChainInput, ...],
    buffers: list[tirx.Buffer],
    row: Expr,
    size: int,
    offset: loops.Extent,
    lanes: int,
    where: Expr | None,
) -> list[Expr]:
    """A vector of each of a chain's inputs for some columns of a row; scalars of "row" and "scalar" ones."""
    places = {"full": row * size + offset, "column": offset, "row": row, "scalar": 0}
    values = []
    for value, buffer in zip(inputs, buffers, strict=True):
        wide = value.kind in ("full", "column")
        at = places[value.kind]
        loaded = loops.load(buffer, at, lanes, where) if wide else buffer[at]
        values.append(math.cast(loaded, value.dtype))
    return values
