"""The dialect: one open table of operations.

An operation is a torch function with a convention: **positional parameters are operands** (values of the
program, Python numbers, ``None`` for an absent one, a tuple of values for a variadic one) and **keyword-only
parameters are attributes** (plain data: numbers, strings, tuples, symbolic dimensions). The function itself
is the reference, so every program runs in plain torch, with autograd. `Op` objects are the targets of the
``call_function`` nodes.

Every operation has one result.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from tersor.errors import ProgramError
from tersor.ir.dims import Dim
from tersor.ir.value import Value

Infer = Callable[..., Value]


@dataclass(frozen=True)
class Cost:
    """Work of one node: multiply-accumulates and bytes moved if nothing is fused (ints or symbolic)."""

    macs: int | Dim = 0
    bytes: int | Dim = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.macs + other.macs, self.bytes + other.bytes)


@dataclass(frozen=True, eq=False)
class Op:
    """One operation of the dialect.

    Attributes:
        name: unique name, used in text and in saved programs; third parties prefix theirs: ``mylib.fold``.
        reference: the torch function that defines its meaning.
        infer: from operand `Value`s (numbers and None stay as they are) and attributes to the result's one.
        macs: multiply-accumulates, called like ``infer`` with the result's `Value` first; 0 when absent.
        bytes: bytes read and written when nothing is fused, called like ``macs``; every operand and the
            result once when absent.
        decompose: ``decompose(build, *operands, **attributes) -> Node`` over other dialect ops; with it code
            generation needs to know nothing of the op.
        elementwise: name of the operation in a kernel's element-wise chain, when it is one.
        captures: torch operators (``torch.ops.mylib.fold.default``) whose calls become this op at capture,
            with the same operands in order and attributes by name.
    """

    name: str
    reference: Callable[..., Any]
    infer: Infer
    macs: Callable[..., int | Dim] | None = None
    bytes: Callable[..., int | Dim] | None = None
    decompose: Callable[..., Any] | None = None
    elementwise: str | None = None
    captures: tuple[Any, ...] = ()
    signature: inspect.Signature = field(init=False)
    operands: tuple[str, ...] = field(init=False)
    attributes: dict[str, Any] = field(init=False)  # name -> default or inspect.Parameter.empty

    def __post_init__(self) -> None:
        try:
            signature = inspect.signature(self.reference)
        except ValueError:
            raise ProgramError(
                f"the reference of operation {self.name!r} does not say what its parameters are",
                why="built-in functions have no signature",
                fix="wrap it: def reference(x, *, attribute): ...",
            ) from None
        object.__setattr__(self, "signature", signature)
        parameters = self.signature.parameters.values()
        object.__setattr__(
            self,
            "operands",
            tuple(p.name for p in parameters if p.kind is not inspect.Parameter.KEYWORD_ONLY),
        )
        object.__setattr__(
            self,
            "attributes",
            {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY},
        )

    @property
    def __name__(self) -> str:  # fx prints targets by it
        return self.name

    @property
    def doc(self) -> str:
        return inspect.getdoc(self.reference) or ""

    def bind(self, operands: tuple[Any, ...], attributes: Mapping[str, Any]) -> dict[str, Any]:
        """Every operand and attribute by name, defaults filled in.

        Raises:
            ProgramError: naming what is missing, unknown or too much.
        """
        if by_name := [name for name in self.operands if name in attributes]:
            raise ProgramError(
                f"{self.name}: operands are given by position, not by name: {', '.join(by_name)}"
            )
        try:
            bound = self.signature.bind(*operands, **attributes)
        except TypeError as error:
            raise ProgramError(
                f"{self.name}: {error}", fix=f"its form is {self.name}{self.signature}"
            ) from None
        bound.apply_defaults()
        return bound.arguments

    def __call__(self, *operands: Any, **attributes: Any) -> Any:
        return self.reference(*operands, **attributes)

    def __repr__(self) -> str:
        return f"<op {self.name}>"

    def __deepcopy__(self, memo: dict) -> Op:
        return self


class Dialect:
    """The table of operations, by name and by captured torch operator."""

    def __init__(self) -> None:
        self._ops: dict[str, Op] = {}
        self._captures: dict[Any, Op] = {}

    def register(self, op: Op) -> Op:
        if op.name in self._ops:
            raise ProgramError(
                f"operation {op.name!r} is registered twice", fix="prefix it with your package's name"
            )
        for target in op.captures:
            if target in self._captures:
                raise ProgramError(
                    f"{target} is captured by {self._captures[target].name!r} already, not by {op.name!r}"
                )
        self._ops[op.name] = op
        for target in op.captures:
            self._captures[target] = op
        return op

    def get(self, name: str) -> Op:
        try:
            return self._ops[name]
        except KeyError:
            raise ProgramError(
                f"unknown operation {name!r}",
                why="it is not in the dialect",
                fix="import or install the package that registers it (tersor.ir.register_op)",
            ) from None

    def captured(self, target: Any) -> Op | None:
        """The op that a torch operator becomes at capture, when a third party registered one."""
        return self._captures.get(target)

    def __contains__(self, name: str) -> bool:
        return name in self._ops

    def __iter__(self) -> Iterator[Op]:
        return iter(self._ops.values())

    def __getattr__(self, name: str) -> Op:
        if name.startswith("__") or name not in self._ops:
            raise AttributeError(name)
        return self._ops[name]


ops = Dialect()


def register_op(
    name: str,
    reference: Callable[..., Any],
    *,
    infer: Infer | None = None,
    decompose: Callable[..., Any] | None = None,
    macs: Callable[..., int | Dim] | None = None,
    bytes: Callable[..., int | Dim] | None = None,
    elementwise: str | None = None,
    captures: tuple[Any, ...] = (),
) -> Op:
    """Add an operation to the dialect (see `Op` for the arguments).

    Without ``infer`` the result's shape follows from ``decompose``. An op without a decomposition needs a
    lowering (``tersor.codegen.register_lowering``) before it can be compiled.

    Raises:
        ProgramError: the name is taken, or neither ``infer`` nor ``decompose`` is given.
    """
    if infer is None:
        if decompose is None:
            raise ProgramError(
                f"operation {name!r} has neither a shape rule nor a decomposition", fix="give one of them"
            )
        infer = _infer_by_decomposition(decompose)
    return ops.register(
        Op(name, reference, infer, macs, bytes, decompose, elementwise=elementwise, captures=tuple(captures))
    )


def _infer_by_decomposition(decompose: Callable[..., Any]) -> Infer:
    def infer(*operands: Any, **attributes: Any) -> Value:
        from tersor.ir.program import Function  # the builder needs the dialect first

        scratch = Function("scratch")

        def node(x: Any) -> Any:
            if isinstance(x, tuple):
                return tuple(map(node, x))
            return scratch.add_input(f"operand_{len(scratch.graph.nodes)}", x) if isinstance(x, Value) else x

        return decompose(scratch.builder(), *map(node, operands), **attributes).meta["value"]

    return infer
