"""The table of exporters: which ONNX operators each operation becomes, by its name and the opset since which.

An exporter is called with an `Export` and returns the name of the value that it made.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import Parameter
from typing import Any

import torch
from torch import fx

from tersor.errors import ProgramError
from tersor.frontends.onnx.export.graph import Writer
from tersor.ir import Op, Value
from tersor.ir.dims import Shape
from tersor.ir.value import DTYPES

OPSETS = range(18, 24)  # of the standard operators
DEFAULT_OPSET = 20  # has Gelu; onnxruntime and OpenVINO fuse what it lacks

Exporter = Callable[["Export"], str]
EXPORTERS: dict[str, list[tuple[int, Exporter]]] = {}


def exports(*operations: Op | str, since: int = OPSETS.start) -> Callable[[Exporter], Exporter]:
    """Enters an exporter for these operations from an opset on, until the next entry of the same name::

        @exports("mylib.squared_relu")
        def _squared_relu(e: Export) -> str:
            x = e.emit("Relu", e.operand(0))
            return e.emit("Mul", e.emit("Mul", x, x), e.constant(e.attribute("scale"), e.result.dtype))

    Raises:
        ProgramError: one is there already.
    """

    def enter(function: Exporter) -> Exporter:
        for name in (o.name if isinstance(o, Op) else o for o in operations):
            versions = EXPORTERS.setdefault(name, [])
            if any(since == known for known, _ in versions):
                raise ProgramError(f"operation {name!r} has an exporter to opset {since} already")
            versions.append((since, function))
            versions.sort(key=lambda entry: -entry[0])
        return function

    return enter


def find_exporter(operation: str, opset: int) -> Exporter | None:
    """The exporter of an operation to an opset."""
    return next((function for since, function in EXPORTERS.get(operation, []) if since <= opset), None)


class Export:
    """One operation being exported: its operands and attributes, and the operators that it becomes."""

    def __init__(self, writer: Writer, node: fx.Node):
        self.writer, self.node = writer, node
        self._bound = node.target.bind(node.args, node.kwargs)
        self._operands = [self._bound[name] for name in node.target.operands]
        self._looked_at: set[str] = set()

    # -- reading

    @property
    def opset(self) -> int:
        return self.writer.opset

    @property
    def result(self) -> Value:
        """What the operation gives."""
        return self.node.meta["value"]

    def attribute(self, name: str) -> Any:
        """An attribute, or its default."""
        self._looked_at.add(name)
        return self._bound[name]

    @property
    def overlooked(self) -> list[str]:
        """Attributes that are not at their default and that the exporter has not asked for."""
        known = self.node.target.attributes.items()
        return [
            name
            for name, default in known
            if name not in self._looked_at and default is not Parameter.empty and self._bound[name] != default
        ]

    def given(self, i: int) -> bool:
        return i < len(self._operands) and self._operands[i] is not None

    def argument(self, i: int) -> Any:
        """Operand i as it stands in the program: a node, a Python number, None, or a tuple of them."""
        return self._operands[i]

    def value(self, i: int) -> Value:
        """dtype and shape of operand i, which has to be a value of the program."""
        return self.argument(i).meta["value"]

    def axis(self, i: int, name: str = "dim") -> int:
        """An attribute that names an axis of operand i, counted from the front."""
        return self.attribute(name) % max(self.value(i).rank, 1)

    def parameter(self, i: int) -> torch.Tensor | None:
        """The stored tensor that operand i is; None for computed ones."""
        return self.writer.function.parameter(self.argument(i))

    # -- writing

    def operand(self, i: int, dtype: str | None = None) -> str:
        """The name of operand i, cast to ``dtype`` where it is of another one; numbers become constants."""
        return self.read(self.argument(i), dtype)

    def read(self, argument: Any, dtype: str | None = None) -> str:
        """Like `operand`, for an argument taken from a tuple."""
        if not isinstance(argument, fx.Node):
            return self.constant(argument, dtype or self.result.dtype)
        return self.cast(self.writer.names[argument], argument.meta["value"].dtype, dtype)

    def optional(self, i: int) -> str:
        """The name of operand i, or the empty name that stands for an absent one."""
        return self.operand(i) if self.given(i) else ""

    def emit(self, operator: str, *inputs: str, domain: str = "", result: int = 0, **attributes: Any) -> str:
        """One operator, of whose results one is used; its name is returned. Equal operators are written once."""
        return self.writer.emit(self.node, operator, inputs, attributes, domain, result)

    def constant(self, content: Any, dtype: str) -> str:
        """A number, or nested lists of them, as a value without a name of its own."""
        return self.writer.constant(torch.as_tensor(content, dtype=DTYPES[dtype]))

    def cast(self, x: str, have: str, want: str | None) -> str:
        if want is None or have == want:
            return x
        return self.emit("Cast", x, to=self.writer.type_code(want))

    def sizes(self, shape: Shape) -> str:
        """A shape, or other sizes over named dimensions, as a vector of int64."""
        return self.writer.sizes(shape)

    def reshape(self, x: str, have: Shape, want: Shape) -> str:
        """x of shape ``have`` in the shape ``want``, with as little arithmetic on sizes as that needs."""
        if tuple(have) == tuple(want):
            return x
        sizes = list(want)
        if 0 in sizes:  # ONNX reads 0 and -1 as something else
            return self.emit("Reshape", x, self.sizes(want), allowzero=1)
        for i, size in enumerate(want):
            if not isinstance(size, int) and i < len(have) and have[i] == size:
                sizes[i] = 0  # "as it is"
        open_ = [i for i, size in enumerate(sizes) if not isinstance(size, int)]
        if open_:
            sizes[max(open_, key=lambda i: len(str(sizes[i])))] = -1  # "what is left"
        return self.emit("Reshape", x, self.sizes(sizes))

    def permute(self, x: str, dims: tuple[int, ...]) -> str:
        return x if list(dims) == list(range(len(dims))) else self.emit("Transpose", x, perm=list(dims))
