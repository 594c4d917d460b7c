"""The table of converters: what each ONNX operator becomes, by domain, name and the opset since which it means that.

A converter is called with a `Call` and returns a node, a `Known` value, or a tuple of them for an operator with
several results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from tersor.errors import CaptureError
from tersor.frontends.onnx.reader import STANDARD, Operator, Reference, StoredTensor
from tersor.frontends.onnx.values import Known
from tersor.ir import Builder, Dim, Value
from tersor.ir.canonicalize.indices import slice_inside
from tersor.ir.dims import Shape
from tersor.ir.opset.rules import broadcast

MICROSOFT = "com.microsoft"  # onnxruntime's own operators
Converter = Callable[["Call"], Any]
CONVERTERS: dict[tuple[str, str], list[tuple[int, Converter]]] = {}


def converts(*names: str, since: int = 1, domain: str = STANDARD) -> Callable[[Converter], Converter]:
    """Enters a converter for these operators from an opset on, until the next entry of the same name."""

    def enter(function: Converter) -> Converter:
        for name in names:
            versions = CONVERTERS.setdefault((domain, name), [])
            versions.append((since, function))
            versions.sort(key=lambda entry: -entry[0])
        return function

    return enter


def find_converter(domain: str, name: str, version: int) -> Converter | None:
    """The converter for an operator in an opset."""
    versions = CONVERTERS.get((domain, name), [])
    return next((function for since, function in versions if since <= version), None)


class Call:
    """One operator being converted: its operands, its attributes, and where its result is built."""

    def __init__(
        self,
        build: Builder,
        operator: Operator,
        inputs: Sequence[fx.Node | Known | None],
        attributes: dict[str, Any],
        materialize: Callable[[Builder, Known], fx.Node],
    ):
        self.build, self.operator, self.inputs, self.attributes = build, operator, inputs, attributes
        self._materialize = materialize

    def on(self, inputs: Sequence[fx.Node | Known | None], attributes: dict[str, Any]) -> Call:
        """The same operator in other words: other operands and attributes."""
        return Call(self.build, self.operator, inputs, attributes, self._materialize)

    # -- operands

    def given(self, i: int) -> bool:
        return i < len(self.inputs) and self.inputs[i] is not None

    def require(self, i: int) -> fx.Node | Known:
        if not self.given(i):
            raise CaptureError(f"{self.operator} lacks its operand number {i}")
        return self.inputs[i]

    def node(self, i: int) -> fx.Node:
        """Operand i as a value of the program."""
        return self.as_node(self.require(i))

    def optional(self, i: int) -> fx.Node | None:
        return self.node(i) if self.given(i) else None

    def as_node(self, x: fx.Node | Known) -> fx.Node:
        return self._materialize(self.build, x) if isinstance(x, Known) else x

    def operands(self) -> list[Any]:
        """All operands of an element-wise operator, constants with one element as numbers."""
        given = [x for x in self.inputs if x is not None]
        # A constant of higher rank than everything else adds axes to the result.
        rank = max((len(size(x)) for x in given if not (isinstance(x, Known) and x.is_number)), default=-1)
        operands = [_number(x, rank) for x in map(self.require, range(len(self.inputs)))]
        if not any(isinstance(x, fx.Node | Known) for x in operands):
            operands[0] = self.inputs[0]
        return [self.as_node(x) if isinstance(x, fx.Node | Known) else x for x in operands]

    def known(self, i: int) -> Known | None:
        """Operand i where its contents are known, else None."""
        x = self.inputs[i] if self.given(i) else None
        return x if isinstance(x, Known) else None

    def constant(self, i: int) -> Known:
        """Operand i, whose contents have to be known.

        Raises:
            CaptureError: they depend on the values of tensors.
        """
        x = self.require(i)
        if not isinstance(x, Known):
            raise CaptureError(
                f"operand {i} of {self.operator} depends on the values of tensors",
                why="a program's shapes and indices depend on the sizes of its inputs only",
                fix="compute it outside the model, or export the model with this size fixed",
            )
        return x

    def sizes(self, i: int) -> tuple[int | Dim, ...]:
        """The elements of operand i, which has to be known."""
        return tuple(self.constant(i).objects().reshape(-1))

    def ints(self, i: int) -> tuple[int, ...]:
        sizes = self.sizes(i)
        if any(isinstance(s, Dim) for s in sizes):
            raise CaptureError(
                f"operand {i} of {self.operator} is {', '.join(map(str, sizes))}", why="it must be static"
            )
        return tuple(int(s) for s in sizes)

    def number(self, i: int, default: Any = None) -> Any:
        """The only element of operand i; the default where the operand is absent."""
        return self.constant(i).number() if self.given(i) else default

    def attribute(self, name: str, default: Any = None) -> Any:
        value = self.attributes.get(name, default)
        if isinstance(value, Reference):
            raise CaptureError(f"{self.operator} refers to attribute {value.name!r} outside of a function")
        return Known(value.read()) if isinstance(value, StoredTensor) else value

    def axes(self, i: int, rank: int) -> tuple[int, ...] | None:
        """Axes that old opsets give as the attribute ``axes`` and new ones as operand i; None where absent."""
        axes = self.ints(i) if self.given(i) else self.attribute("axes")
        return None if axes is None else tuple(self.axis(a, rank) for a in axes)

    def axis(self, axis: int, rank: int) -> int:
        if not -max(rank, 1) <= axis < max(rank, 1):
            raise CaptureError(f"{self.operator} names axis {axis} of {rank}")
        return axis % max(rank, 1)

    def refuse(self, what: str, why: str | None = None, fix: str | None = None) -> CaptureError:
        return CaptureError(f"{self.operator} {what}", why=why, fix=fix)

    # -- results

    @property
    def results(self) -> int:
        """How many results the file names, up to the last one that is used."""
        return len(self.operator.outputs)

    def cast(self, x: fx.Node, dtype: str) -> fx.Node:
        return x if x.meta["value"].dtype == dtype else self.build.cast(x, dtype=dtype)

    def reshape(self, x: fx.Node, shape: Sequence[int | Dim]) -> fx.Node:
        return x if size(x) == tuple(shape) else self.build.reshape(x, shape=tuple(shape))

    def slice(self, x: fx.Node, dim: int, start: int | Dim, end: int | Dim, step: int = 1) -> fx.Node:
        if (start, end, step) == (0, size(x)[dim], 1):
            return x
        return slice_inside(self.build, x, dim, start, end, step, f"{self.operator} reads what is not there")

    def concat(self, parts: Sequence[fx.Node], dim: int) -> fx.Node:
        return parts[0] if len(parts) == 1 else self.build.concat(tuple(parts), dim=dim)

    def expand(self, x: fx.Node, shape: Shape) -> fx.Node:
        return x if size(x) == tuple(shape) else self.build.expand(x, shape=tuple(shape))


def size(x: fx.Node | Known) -> Shape:
    return x.shape if isinstance(x, Known) else x.meta["value"].shape


def value(x: fx.Node) -> Value:
    return x.meta["value"]


def dtype(x: fx.Node | Known) -> str:
    return x.dtype if isinstance(x, Known) else x.meta["value"].dtype


def joint_shape(*operands: Any) -> Shape:
    """What operands broadcast to."""
    return broadcast(*(size(x) if isinstance(x, fx.Node | Known) else () for x in operands))


def _number(x: fx.Node | Known, rank: int) -> Any:
    """A constant with one element as a number that promotes to the other operand's type; else x itself."""
    if not isinstance(x, Known) or not x.is_number or len(x.shape) > rank or x.sizes is not None:
        return x
    if len(x.shape) == rank and rank > 0 and x.tensor.numel() == 1 and x.tensor.dtype == torch.bool:
        return x
    return x if x.tensor.dtype in (torch.bool, torch.uint8) else x.number()
