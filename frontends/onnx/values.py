"""Values that are known while a file is read: stored tensors, constants, and sizes over named dimensions.

Exporters spell out every shape as a small tower of integer operators (Shape, Gather, Concat, Reshape). Here such a
tower is evaluated, with polynomials over the dimensions' names (`tersor.ir.Dim`) where sizes are dynamic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tersor.errors import InputError
from tersor.frontends.onnx.codes import Encoded
from tersor.ir import Dim, Range
from tersor.ir.canonicalize.affine import lower_bound
from tersor.ir.value import DTYPE_NAMES

SMALL = 1 << 16  # bytes of a constant that is evaluated while the file is read


@dataclass(frozen=True)
class Known:
    """A tensor whose contents are known: either all numbers, or integers among which are dimensions.

    Attributes:
        tensor: the numbers; None for sizes.
        sizes: int64 values as an object array of ints and `Dim`s, at least one of them a `Dim`; None for numbers.
        name: of the stored tensor that this is, or was decoded from; "" for others.
        codes: whether it was decoded from 8-bit codes.
        encoded: the codes and scales that it was decoded from, where the file decodes them by an operator.
    """

    tensor: torch.Tensor | None = None
    sizes: np.ndarray | None = None
    name: str = ""
    codes: bool = False
    encoded: Encoded | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.sizes.shape if self.tensor is None else self.tensor.shape)

    @property
    def dtype(self) -> str:
        return "int64" if self.tensor is None else DTYPE_NAMES[self.tensor.dtype]

    @property
    def is_number(self) -> bool:
        return math.prod(self.shape) == 1

    def objects(self) -> np.ndarray:
        """The elements as Python numbers and `Dim`s."""
        if self.sizes is not None:
            return self.sizes
        array = np.empty(self.shape, dtype=object)
        array.reshape(-1)[:] = self.tensor.reshape(-1).tolist()
        return array

    def number(self) -> int | float | bool | Dim:
        """The only element; of float32 the shortest decimal that means the same, as the model's author wrote it.

        Raises:
            InputError: there are more, or none.
        """
        if not self.is_number:
            raise InputError(
                f"a constant of shape {list(self.shape)} stands where one number has to",
                why="the file is damaged",
            )
        if self.sizes is not None:
            return self.sizes.item()
        number = self.tensor.item()
        if self.tensor.dtype == torch.float32:
            short = float(str(np.float32(number)))
            # Of the largest float the shortest decimal lies beyond it, where torch sees an overflow.
            return short if abs(short) <= torch.finfo(torch.float32).max or math.isinf(number) else number
        return number


def known_sizes(array: Any) -> Known:
    """Ints and `Dim`s of any arrangement as one value."""
    array = np.asarray(array, dtype=object)
    if any(isinstance(d, Dim) for d in array.reshape(-1)):
        return Known(sizes=array)
    flat = torch.tensor([int(d) for d in array.reshape(-1)], dtype=torch.int64)
    return Known(flat.reshape(array.shape))


@dataclass(frozen=True)
class SizeCall:
    """An operator on sizes: its operands, its attributes (axes among them, wherever the opset has them)."""

    operands: Sequence[np.ndarray | None]
    attributes: Mapping[str, Any]
    dims: Mapping[str, Range]

    def __getitem__(self, i: int) -> np.ndarray:
        return self.operands[i]

    def ints(self, name: str, i: int) -> list[int] | None:
        """A list that is an attribute in old opsets and an operand in new ones."""
        if len(self.operands) > i and self.operands[i] is not None:
            return [int(x) for x in self.operands[i].reshape(-1)]
        return self.attributes.get(name)


class Undecided(Exception):
    """A result on sizes is not a polynomial, or a comparison depends on the size."""


def evaluate_sizes(op: str, call: SizeCall) -> Known | None:
    """The result of a standard operator on sizes; None when it is not of that kind."""
    function = _ON_SIZES.get(op)
    if function is None:
        return None
    try:
        result = function(call)
    except (Undecided, TypeError, ValueError, IndexError):
        return None
    if isinstance(result, torch.Tensor):
        return Known(result)
    return known_sizes(result)


def sign(value: int | Dim, dims: Mapping[str, Range]) -> int:
    """-1, 0 or 1 where that is so for all sizes.

    Raises:
        Undecided: it is not.
    """
    if isinstance(value, int):
        return (value > 0) - (value < 0)
    if lower_bound(value, dims) >= 1:
        return 1
    if lower_bound(-value, dims) >= 1:
        return -1
    raise Undecided


def _each(function: Callable[..., Any], *arrays: np.ndarray) -> np.ndarray:
    return np.frompyfunc(function, len(arrays), 1)(*arrays) + np.zeros((), dtype=object)


def _quotient(x: int | Dim, y: int | Dim) -> int | Dim:
    if isinstance(x, int) and isinstance(y, int):
        return int(math.trunc(x / y)) if abs(x) < 1 << 50 and y else x // y
    if isinstance(x, Dim) and x.divisible(y):
        return x // y
    raise Undecided


def _compare(holds: Callable[[int], bool]) -> Callable[[SizeCall], torch.Tensor]:
    def compare(c: SizeCall) -> torch.Tensor:
        found = _each(lambda x, y: holds(sign(x - y, c.dims)), c[0], c[1])
        return torch.from_numpy(np.asarray(found, dtype=bool))

    return compare


def _extreme(which: int) -> Callable[[SizeCall], np.ndarray]:
    def pick(c: SizeCall) -> np.ndarray:
        result = c[0]
        for other in c.operands[1:]:
            result = _each(lambda x, y: x if sign(x - y, c.dims) * which >= 0 else y, result, other)
        return result

    return pick


def _slice(c: SizeCall) -> np.ndarray:
    starts, ends = (c[i].reshape(-1) for i in (1, 2))
    axes = c.ints("axes", 3) or list(range(len(starts)))
    steps = c.ints("steps", 4) or [1] * len(starts)
    result = c[0]
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        index = [slice(None)] * result.ndim
        index[axis] = slice(int(start), int(end), int(step))
        result = result[tuple(index)]
    return result


def _squeeze(c: SizeCall) -> np.ndarray:
    axes = c.ints("axes", 1)
    return c[0].squeeze(tuple(axes) if axes else None)


def _cast(c: SizeCall) -> np.ndarray:
    if c.attributes.get("to") not in (6, 7):
        raise Undecided
    return c[0]


def _reduce(function: Callable[[Any, Any], Any]) -> Callable[[SizeCall], np.ndarray]:
    def reduce(c: SizeCall) -> np.ndarray:
        axes = c.ints("axes", 1)
        if c[0].ndim != 1 or axes not in (None, [], [0], [-1]):
            raise Undecided
        total = c[0][0]
        for size in c[0][1:]:
            total = function(total, size)
        return np.array([total] if c.attributes.get("keepdims", 1) else total, dtype=object)

    return reduce


_ON_SIZES: dict[str, Callable[[SizeCall], Any]] = {
    "Identity": lambda c: c[0],
    "Cast": _cast,
    "Gather": lambda c: np.take(c[0], c[1].astype(np.int64), axis=c.attributes.get("axis", 0)),
    "Slice": _slice,
    "Concat": lambda c: np.concatenate(list(c.operands), axis=c.attributes["axis"]),
    "Squeeze": _squeeze,
    "Unsqueeze": lambda c: np.expand_dims(c[0], tuple(c.ints("axes", 1))),
    "Reshape": lambda c: c[0].reshape([int(d) for d in c[1]]),
    "Expand": lambda c: np.broadcast_to(c[0], np.broadcast_shapes(c[0].shape, tuple(int(d) for d in c[1]))),
    "Transpose": lambda c: c[0].transpose(c.attributes.get("perm")),
    "Add": lambda c: _each(lambda x, y: x + y, c[0], c[1]),
    "Sub": lambda c: _each(lambda x, y: x - y, c[0], c[1]),
    "Mul": lambda c: _each(lambda x, y: x * y, c[0], c[1]),
    "Div": lambda c: _each(_quotient, c[0], c[1]),
    "Neg": lambda c: _each(lambda x: -x, c[0]),
    "Abs": lambda c: _each(lambda x: x if sign(x, c.dims) >= 0 else -x, c[0]),
    "Min": _extreme(-1),
    "Max": _extreme(1),
    "Equal": _compare(lambda s: s == 0),
    "Less": _compare(lambda s: s < 0),
    "LessOrEqual": _compare(lambda s: s <= 0),
    "Greater": _compare(lambda s: s > 0),
    "GreaterOrEqual": _compare(lambda s: s >= 0),
    "Where": lambda c: _each(lambda when, x, y: x if when else y, *c.operands),
    "ReduceProd": _reduce(lambda x, y: x * y),
    "ReduceSum": _reduce(lambda x, y: x + y),
}
