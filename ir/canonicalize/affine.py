"""Integers that are a linear function of position: aranges and what models compute from them.

Position ids, gather indices and causal masks are small towers of integer arithmetic over `arange`. Each value in
such a tower is ``offset + sum(coefficient[axis] * position[axis])``; a comparison of two of them is ``that >= 0``.
Found symbolically, so what follows holds at every size of the dynamic dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from tersor.ir.dims import Dim, Shape
from tersor.ir.matching import is_call, is_number
from tersor.ir.program import Function, Range

Number = int | Dim
LARGEST_PARAMETER = 1 << 22  # elements of a buffer that is looked at


@dataclass(frozen=True)
class Affine:
    """``offset + sum(coefficients[a] * i_a)`` at position i of a tensor of ``shape``; zero coefficients are absent."""

    shape: Shape
    offset: Number
    coefficients: Mapping[int, Number]

    def mapped(self, shape: Shape, axes: Mapping[int, int]) -> Affine:
        """The same values in another shape; ``axes`` says where each axis went, those of size 1 may be left out."""
        kept = {axes[a]: c for a, c in self.coefficients.items() if self.shape[a] != 1}
        return Affine(shape, self.offset, kept)

    def lifted(self, shape: Shape) -> Affine:
        """Broadcast to ``shape``."""
        shift = len(shape) - len(self.shape)
        return self.mapped(shape, {a: a + shift for a in self.coefficients})

    def plus(self, other: Affine, shape: Shape, sign: int = 1) -> Affine:
        left, right = self.lifted(shape), other.lifted(shape)
        total = dict(left.coefficients)
        for axis, c in right.coefficients.items():
            total[axis] = total.get(axis, 0) + c * sign
        return Affine(shape, left.offset + right.offset * sign, {a: c for a, c in total.items() if c != 0})

    def times(self, factor: Number) -> Affine:
        scaled = {a: c * factor for a, c in self.coefficients.items()} if factor != 0 else {}
        return Affine(self.shape, self.offset * factor, scaled)

    @property
    def is_constant(self) -> bool:
        return not self.coefficients

    def at_least_zero(self, dims: Mapping[str, Range]) -> bool | None:
        """True or False where that is so at every position and every size of the dimensions, else None."""
        smallest: Number = self.offset
        largest: Number = self.offset
        for axis, c in self.coefficients.items():
            end = c * (self.shape[axis] - 1)
            if lower_bound(c, dims) >= 0:
                largest = largest + end
            elif lower_bound(c * -1, dims) >= 0:
                smallest = smallest + end
            else:
                return None
        if lower_bound(smallest, dims) >= 0:
            return True
        if lower_bound(largest * -1, dims) >= 1:
            return False
        return None


def lower_bound(value: Number, dims: Mapping[str, Range]) -> int:
    """A number that a polynomial over the dimensions does not fall below."""
    if isinstance(value, int):
        return value
    total = 0
    for monomial, coefficient in value.terms:
        extreme = coefficient
        for name in monomial:
            extreme *= dims[name].min if coefficient > 0 else dims[name].max
        total += extreme
    return total


@dataclass(frozen=True)
class Predicate:
    """A boolean tensor that is true where ``difference >= 0``."""

    difference: Affine


class Positions:
    """Reads integer and boolean towers of a function."""

    def __init__(self, function: Function):
        self.function = function
        self._known: dict[fx.Node, Any] = {}

    def read(self, node: Any) -> Affine | Predicate | None:
        """What a value is, when it is affine in its position or a comparison of such values."""
        if is_number(node) and isinstance(node, int):
            return Affine((), node, {})
        if not isinstance(node, fx.Node):
            return None
        if node not in self._known:
            self._known[node] = self._read(node)
        return self._known[node]

    def affine(self, node: Any) -> Affine | None:
        found = self.read(node)
        return found if isinstance(found, Affine) else None

    def predicate(self, node: Any) -> Predicate | None:
        found = self.read(node)
        return found if isinstance(found, Predicate) else None

    def _read(self, node: fx.Node) -> Affine | Predicate | None:
        value = node.meta["value"]
        if value.is_float:
            return None
        if node.op == "get_attr":
            return from_tensor(self.function.parameters[node.target].tensor)
        if node.op != "call_function":
            return None
        reader = getattr(self, f"_{node.target.name}", None)
        return reader(node, value.shape) if reader else None

    def _arange(self, node: fx.Node, shape: Shape) -> Affine:
        return Affine(shape, 0, {0: 1} if shape[0] != 1 else {})

    def _full(self, node: fx.Node, shape: Shape) -> Affine | Predicate:
        value = node.kwargs["value"]
        if isinstance(value, bool):
            return Predicate(Affine(shape, 0 if value else -1, {}))
        return Affine(shape, value if isinstance(value, Dim) else int(value), {})

    def _add(self, node: fx.Node, shape: Shape, sign: int = 1) -> Affine | None:
        x, y = (self.affine(a) for a in node.args)
        return x.plus(y, shape, sign) if x and y else None

    def _sub(self, node: fx.Node, shape: Shape) -> Affine | None:
        return self._add(node, shape, -1)

    def _neg(self, node: fx.Node, shape: Shape) -> Affine | None:
        x = self.affine(node.args[0])
        return x.times(-1) if x else None

    def _mul(self, node: fx.Node, shape: Shape) -> Affine | None:
        x, y = (self.affine(a) for a in node.args)
        if not x or not y or not (x.is_constant or y.is_constant):
            return None
        return (y.times(x.offset) if x.is_constant else x.times(y.offset)).lifted(shape)

    def _cast(self, node: fx.Node, shape: Shape) -> Affine | None:
        wide = node.kwargs["dtype"] in ("int32", "int64")
        return self.affine(node.args[0]) if wide else None

    def _compare(self, node: fx.Node, shape: Shape, low: int, high: int, minus: int) -> Predicate | None:
        x, y = self.affine(node.args[low]), self.affine(node.args[high])
        if not x or not y:
            return None
        difference = y.plus(x, shape, -1)
        return Predicate(Affine(shape, difference.offset - minus, difference.coefficients))

    def _le(self, node: fx.Node, shape: Shape) -> Predicate | None:
        return self._compare(node, shape, 0, 1, 0)

    def _lt(self, node: fx.Node, shape: Shape) -> Predicate | None:
        return self._compare(node, shape, 0, 1, 1)

    def _ge(self, node: fx.Node, shape: Shape) -> Predicate | None:
        return self._compare(node, shape, 1, 0, 0)

    def _gt(self, node: fx.Node, shape: Shape) -> Predicate | None:
        return self._compare(node, shape, 1, 0, 1)

    def _logical_not(self, node: fx.Node, shape: Shape) -> Predicate | None:
        inner = self.predicate(node.args[0])
        if not inner:
            return None
        negated = inner.difference.times(-1)
        return Predicate(Affine(shape, negated.offset - 1, negated.coefficients))

    def _moved(self, node: fx.Node, shape: Shape, axes: Mapping[int, int]) -> Affine | Predicate | None:
        inner = self.read(node.args[0])
        if isinstance(inner, Predicate):
            return Predicate(inner.difference.mapped(shape, axes))
        return inner.mapped(shape, axes) if inner else None

    def _reshape(self, node: fx.Node, shape: Shape) -> Affine | Predicate | None:
        before = node.args[0].meta["value"].shape
        old = [i for i, d in enumerate(before) if d != 1]
        new = [i for i, d in enumerate(shape) if d != 1]
        if [before[i] for i in old] != [shape[i] for i in new]:
            inner = self.read(node.args[0])
            affine = inner.difference if isinstance(inner, Predicate) else inner
            return self._moved(node, shape, {}) if affine and affine.is_constant else None
        return self._moved(node, shape, dict(zip(old, new, strict=True)))

    def _expand(self, node: fx.Node, shape: Shape) -> Affine | Predicate | None:
        rank = node.args[0].meta["value"].rank
        return self._moved(node, shape, {i: i + len(shape) - rank for i in range(rank)})

    def _permute(self, node: fx.Node, shape: Shape) -> Affine | Predicate | None:
        return self._moved(node, shape, {d: i for i, d in enumerate(node.kwargs["dims"])})

    def _slice(self, node: fx.Node, shape: Shape) -> Affine | Predicate | None:
        inner, dim = self.read(node.args[0]), node.kwargs["dim"] % len(shape)
        stored = self.function.parameter(node.args[0])
        fixed = not any(isinstance(a, Dim) for a in node.kwargs.values())
        if inner is None and stored is not None and fixed:  # a part may be affine where the whole is not
            return from_tensor(node.target(stored, **node.kwargs))
        affine = inner.difference if isinstance(inner, Predicate) else inner
        if affine is None:
            return None
        coefficients = dict(affine.coefficients)
        slope = coefficients.get(dim, 0)
        if slope != 0:
            coefficients[dim] = slope * node.kwargs.get("step", 1)
        cut = Affine(shape, affine.offset + slope * node.kwargs.get("start", 0), coefficients)
        return Predicate(cut) if isinstance(inner, Predicate) else cut

    def _where(self, node: fx.Node, shape: Shape) -> Affine | Predicate | None:
        """Where the condition is decided, the branch."""
        condition = self.predicate(node.args[0])
        decided = condition.difference.at_least_zero(self.function.dims) if condition else None
        branch = self.affine(node.args[1 if decided else 2]) if decided is not None else None
        return branch.lifted(shape) if branch else None

    def _gather(self, node: fx.Node, shape: Shape) -> Affine | None:
        """A linear function of an index; the index must be one itself, unless the table is the same all along."""
        x, index = self.affine(node.args[0]), self.affine(node.args[1])
        if not x:
            return None
        dim = node.kwargs["dim"] % len(shape)
        slope = x.coefficients.get(dim, 0)
        rest = Affine(shape, x.offset, {a: c for a, c in x.coefficients.items() if a != dim})
        if slope == 0:
            return rest
        return rest.plus(index.times(slope), shape) if index else None


def from_tensor(tensor: torch.Tensor) -> Affine | Predicate | None:
    """A stored integer table that is affine, or a stored triangle of booleans."""
    if not 0 < tensor.numel() <= LARGEST_PARAMETER or tensor.dtype not in (
        torch.int64,
        torch.int32,
        torch.bool,
    ):
        return None
    if tensor.dtype == torch.bool:
        return _triangle(tensor)
    shape = tuple(tensor.shape)
    origin = (0,) * tensor.ndim
    offset, coefficients = int(tensor[origin]), {}
    expected = torch.full_like(tensor, offset)
    for axis, size in enumerate(shape):
        if size > 1:
            step = tuple(int(i == axis) for i in range(tensor.ndim))
            slope = int(tensor[step]) - offset
            if slope:
                coefficients[axis] = slope
                ramp = torch.arange(size, dtype=tensor.dtype) * slope
                expected += ramp.reshape([-1 if i == axis else 1 for i in range(tensor.ndim)])
    return Affine(shape, offset, coefficients) if torch.equal(expected, tensor) else None


def _triangle(tensor: torch.Tensor) -> Predicate | None:
    shape = tuple(tensor.shape)
    if bool(tensor.all()) or not bool(tensor.any()):
        return Predicate(Affine(shape, 0 if bool(tensor.all()) else -1, {}))
    if tensor.ndim < 2 or tensor.numel() != shape[-1] * shape[-2]:
        return None
    matrix = tensor.reshape(shape[-2:])
    rows, columns = torch.arange(shape[-2])[:, None], torch.arange(shape[-1])[None, :]
    reach = int(matrix[0].sum()) - 1  # the last column that the first row sees
    q, k = tensor.ndim - 2, tensor.ndim - 1
    if torch.equal(matrix, columns <= rows + reach):
        return Predicate(Affine(shape, reach, {q: 1, k: -1}))
    if torch.equal(matrix, columns > rows + (shape[-1] - 1 - int(matrix[0].sum()))):
        return Predicate(Affine(shape, int(matrix[0].sum()) - shape[-1], {q: -1, k: 1}))
    return None


def known(function: Function, node: fx.Node) -> bool | None:
    """Whether a boolean value is true everywhere, or false everywhere; None if neither is certain."""
    predicate = Positions(function).predicate(node)
    return predicate.difference.at_least_zero(function.dims) if predicate else None


def is_stored(node: Any) -> bool:
    """A parameter, or a slice of one: what a table look-up by position should become."""
    return isinstance(node, fx.Node) and (
        node.op == "get_attr" or (is_call(node, "slice") and is_stored(node.args[0]))
    )
