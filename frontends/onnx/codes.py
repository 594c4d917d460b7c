"""Weights and tables that a file stores in codes, back in their codes once the program is in canonical form.

While a program is brought into canonical form, a weight is its decoded values: transposed, cut into query, key and
value, named after its layer as any other. Afterwards a linear layer or embedding whose weight still is, bit for bit,
what some codes of the file decode to reads these through `dequantize` again. Rows of a table that are looked up in
codes and decoded by arithmetic are decoded by `dequantize`, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from tersor.ir import Function, Program
from tersor.ir.matching import is_call
from tersor.ir.opset.quantization import CODES, dequantize


@dataclass(frozen=True, eq=False)
class Encoded:
    """A matrix as it is stored: codes int8 or uint8, a scale and a zero point, each () or [size of axis], f32.

    Of a convolution's kernel [N, C, ...] it is the matrix [N, C k] of k numbers for each channel.
    """

    name: str
    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    axis: int

    def transposed(self) -> Encoded:
        return Encoded(self.name, self.codes.t(), self.scale, self.zero, 1 - self.axis)

    def part(self, dim: int, start: int, length: int) -> Encoded:
        """Some rows (dim 0) or columns (dim 1) of it."""
        along = dim == self.axis
        cut = [
            f.narrow(0, start, length) if f is not None and f.ndim and along else f
            for f in (self.scale, self.zero)
        ]
        return Encoded(self.name, self.codes.narrow(dim, start, length), *cut, self.axis)

    def then(self, op: str, factor: torch.Tensor) -> Encoded | None:
        """Less zero points ("Sub") or times scales ("Mul"), where these are the first and of a form that codes have."""
        shape = (1,) * (2 - factor.ndim) + tuple(factor.shape)
        along = [i for i, n in enumerate(shape) if n != 1]
        axis = along[0] if along else self.axis
        fits = len(along) <= 1 and len(shape) == 2 and (not along or shape[axis] == self.codes.shape[axis])
        crossed = along and self.zero is not None and self.zero.ndim and axis != self.axis
        if (
            not fits
            or crossed
            or self.scale.ndim
            or self.scale != 1
            or (op == "Sub" and self.zero is not None)
        ):
            return None
        numbers = factor.float().reshape(-1 if along else ())
        if op == "Sub":
            return replace(self, zero=numbers, axis=axis)
        return replace(self, scale=numbers, axis=axis)

    def decoded(self) -> torch.Tensor:
        return dequantize(self.codes, self.scale, self.zero, axis=self.axis)

    def signed(self) -> Encoded:
        """With int8 codes, which is what integer products take as weights; the values are the same."""
        if self.codes.dtype == torch.int8:
            return self
        codes = (self.codes.to(torch.int16) - 128).to(torch.int8)
        zero = (torch.zeros_like(self.scale) if self.zero is None else self.zero) - 128
        return Encoded(self.name, codes, self.scale, zero, self.axis)


def name_of(stored: str) -> str:
    """The name of a weight, from that of the tensor that holds its codes."""
    return stored.removesuffix(".codes").removesuffix("_quantized")


def decoded_by(
    op: str, operands: Sequence[torch.Tensor], encoded: Encoded | None, name: str
) -> Encoded | None:
    """What a file's arithmetic on a stored matrix has decoded, by Cast, Sub and Mul; None where it is something else.

    Args:
        op: the operator.
        operands: its operands, the codes or what has become of them first.
        encoded: how the first operand came from codes, where it did.
        name: of the stored codes.
    """
    if op == "Cast" and encoded is None and operands[0].ndim == 2:
        return Encoded(name, operands[0], torch.ones(()), None, 0)
    if encoded is None:
        return None
    if op == "Transpose":
        return encoded.transposed()
    if op in ("Cast", "Identity"):
        return encoded
    return encoded.then(op, operands[1]) if op in ("Sub", "Mul") else None


def return_codes(program: Program, encoded: Sequence[Encoded]) -> list[str]:
    """Linear layers, embeddings and convolutions of codes read the codes again that their weights were decoded from;
    returns a note for each weight that stays decoded.
    """
    if not encoded:
        return []
    found: dict[str, _Stored | None] = {}
    returned: set[Encoded] = set()
    for function in program.functions.values():
        for layer in function.calls("linear", "embedding", "conv1d", "conv2d"):
            weight = function.parameter(layer.args[1])
            if weight is None or weight.dtype != torch.float32:
                continue
            # alone, the codes of a kernel are of no use: products of windows are in float32
            if layer.target.name.startswith("conv") and not is_call(layer.args[0], "dequantize"):
                continue
            name = layer.args[1].target
            if name not in found:
                origin, part = next(_origins(encoded, weight.flatten(1)), (None, None))
                found[name] = None if part is None else _store(program, name, part.signed(), weight.shape)
                returned |= {origin} - {None}
            if (stored := found[name]) is not None:
                build = function.builder(before=layer)
                codes, *factors = (build.read(parameter) for parameter in stored.parameters)
                decoded = build.dequantize(codes, *factors, **stored.form)
                layer.args = (layer.args[0], decoded, *layer.args[2:])
    for function in program.functions.values():
        function.erase_dead(*function.graph.find_nodes(op="get_attr"))
    program.drop_unused_parameters()
    return [
        f"{e.name}: its codes are decoded, as no linear layer, embedding or convolution of codes has them as its weight"
        for e in encoded
        if e not in returned
    ]


def decode_rows(function: Function) -> None:
    """C[i] * s[i]  ->  dequantize(C[i], s[i]) for rows of codes C and, of each row, one scale s."""
    for product in function.calls("mul"):
        for rows, scales in (product.args, product.args[::-1]):
            if not is_call(rows, "embedding") or not is_call(scales, "embedding"):
                continue
            (ids, codes), (same, table) = rows.args, scales.args
            if (
                same is ids
                and codes.meta["value"].dtype in CODES
                and table.meta["value"].dtype == "float32"
                and table.meta["value"].shape[1] == 1
            ):
                build = function.builder(before=product)
                function.replace(product, build.dequantize(rows, build.index_select(table, ids, dim=0)))
                function.erase_dead(scales)
                break


@dataclass(frozen=True)
class _Stored:
    """What `dequantize` is given: parameters for codes, scale and possibly zero point, and attributes."""

    parameters: tuple[str, ...]
    form: Mapping[str, int]


def _store(program: Program, name: str, part: Encoded, shape: torch.Size) -> _Stored:
    add = program.parameters.add
    parameters = [
        add(f"{name}.codes", part.codes.reshape(shape).contiguous()),
        add(f"{name}.scale", part.scale.contiguous()),
    ]
    if part.zero is not None and part.zero.any():
        parameters.append(add(f"{name}.zero_point", part.zero.contiguous()))
    return _Stored(
        tuple(parameters),
        {"axis": part.axis} if part.scale.ndim or (part.zero is not None and part.zero.ndim) else {},
    )


def _origins(encoded: Sequence[Encoded], weight: torch.Tensor) -> Iterator[tuple[Encoded, Encoded]]:
    """The stored matrices that a weight is (part of), with that part in the weight's layout."""
    for origin in encoded:
        for form in (origin.transposed(), origin):
            if (part := _within(form, weight)) is not None:
                yield origin, part


def _within(form: Encoded, weight: torch.Tensor) -> Encoded | None:
    """The consecutive rows of a stored matrix that decode to exactly this weight."""
    rows, columns = weight.shape
    if form.codes.shape[1] != columns or form.codes.shape[0] < rows:
        return None
    first = form.part(1, 0, 1).decoded()[:, 0]
    starts = (first[: first.shape[0] - rows + 1] == weight[0, 0]).nonzero()[:, 0].tolist()
    for start in starts:
        if not torch.equal(first[start : start + rows], weight[:, 0]):
            continue
        part = form.part(0, start, rows)
        if torch.equal(part.decoded(), weight):
            return part
    return None
