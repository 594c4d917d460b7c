"""Checks what a caller passes against a function's signature."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tersor.codegen.runtime.dimensions import Expression
from tersor.codegen.runtime.manifest import FunctionSignature, TensorType, expressions
from tersor.errors import InputError

_REMEMBERED = 4096
"""Combinations of input shapes that are remembered as checked."""


class Arguments:
    """Turns the arguments of a call into numpy arrays of exactly the right dtypes and shapes.

    Values may be numpy arrays, torch CPU tensors, or Python numbers for 0-d inputs. Dtypes must match, except
    that integers and booleans are widened where nothing can be lost (int32 ids for an int64 input); all else,
    such as float64 for float32, is refused with the cast to write, since it would hide a copy or a loss.
    """

    def __init__(self, signature: FunctionSignature):
        self.signature = signature
        self.names = tuple(tensor.name for tensor in signature.inputs)
        self._dtypes = tuple(np.dtype(tensor.dtype) for tensor in signature.inputs)
        self._shapes = tuple(expressions(tensor) for tensor in signature.inputs)
        self._checked: set[tuple[tuple[int, ...], ...]] = set()

    def bind(self, positional: Sequence[Any], named: Mapping[str, Any]) -> tuple[list[np.ndarray], bool]:
        """Arrays in the signature's order, and whether torch tensors were passed. Raises InputError."""
        if positional or len(named) != len(self.names):
            named = self._by_name(positional, named)
        arrays, torch = [], False
        for name, dtype, tensor in zip(self.names, self._dtypes, self.signature.inputs, strict=True):
            value = named.get(name)
            if type(value) is not np.ndarray:
                value, is_torch = self._array(value, tensor, named)
                torch |= is_torch
            if value.dtype != dtype:
                value = _widened(value, dtype, tensor)
            arrays.append(value)
        shapes = tuple(array.shape for array in arrays)
        if shapes not in self._checked:
            self.dimensions(shapes)
            if len(self._checked) >= _REMEMBERED:
                self._checked.clear()
            self._checked.add(shapes)
        return arrays, torch

    def dimensions(self, shapes: Sequence[tuple[int, ...]]) -> dict[str, int]:
        """The value of every symbolic dimension for these shapes; InputError when a shape does not fit."""
        values: dict[str, int] = {}
        origin: dict[str, str] = {}
        for tensor, shape, given in zip(self.signature.inputs, self._shapes, shapes, strict=True):
            if len(given) != len(shape):
                raise InputError(
                    f"input {tensor.name!r} has {len(given)} dimensions, the model takes {len(shape)}",
                    why=f"given {list(given)}, expected {tensor}",
                    fix="add or remove dimensions, for example with reshape or [None]",
                )
            for axis, dim in enumerate(shape):
                if isinstance(dim, Expression) and dim.text in self.signature.dims and dim.text not in values:
                    values[dim.text] = self._in_range(dim.text, given[axis], tensor, axis)
                    origin[dim.text] = f"{tensor.name!r} axis {axis}"
        for tensor, shape, given in zip(self.signature.inputs, self._shapes, shapes, strict=True):
            for axis, dim in enumerate(shape):
                expected = dim.evaluate(values) if isinstance(dim, Expression) else dim
                if given[axis] != expected:
                    self._refuse_size(tensor, axis, given, dim, expected, origin)
        return values

    def shapes(self, values: Mapping[str, int]) -> list[tuple[int, ...]]:
        """The input shapes when the symbolic dimensions have these values."""
        return [
            tuple(dim.evaluate(values) if isinstance(dim, Expression) else dim for dim in shape)
            for shape in self._shapes
        ]

    def _by_name(self, positional: Sequence[Any], named: Mapping[str, Any]) -> Mapping[str, Any]:
        takes = f"the model takes {', '.join(map(str, self.signature.inputs))}"
        if len(positional) > len(self.names):
            raise InputError(
                f"{len(positional)} inputs were given, {len(self.names)} are expected",
                why=takes,
                fix="pass every input once, best by name",
            )
        both = dict(zip(self.names, positional, strict=False))
        if twice := sorted(set(both) & set(named)):
            raise InputError(
                f"input {twice[0]!r} is given twice, by position and by name",
                why=takes,
                fix="pass every input once, best by name",
            )
        both.update(named)
        self._check_names(both)
        return both

    def _check_names(self, given: Mapping[str, Any]) -> None:
        takes = f"the model takes {', '.join(map(str, self.signature.inputs))}"
        unexpected = [name for name in given if name not in self.names]
        missing = [name for name in self.names if given.get(name) is None]
        if unexpected:
            spelled = {name.lower(): name for name in missing or self.names}
            near = difflib.get_close_matches(unexpected[0].lower(), spelled, n=1)
            raise InputError(
                f"unexpected input {', '.join(map(repr, unexpected))}",
                why=takes,
                fix=f"did you mean {spelled[near[0]]!r}?" if near else "leave it out",
            )
        if missing:
            raise InputError(
                f"missing input {', '.join(map(repr, missing))}", why=takes, fix="pass every input, by name"
            )

    def _array(self, value: Any, tensor: TensorType, given: Mapping[str, Any]) -> tuple[np.ndarray, bool]:
        if value is None:
            self._check_names(given)
        if isinstance(value, np.ndarray | np.generic):
            return np.asarray(value), False
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(value, torch.Tensor):
            return _from_torch(value, tensor), True
        if isinstance(value, bool | int | float) and not tensor.shape:
            return _from_number(value, tensor), False
        raise InputError(
            f"input {tensor.name!r} is a {type(value).__name__}",
            why="inputs are numpy arrays or torch tensors",
            fix=f"pass numpy.asarray(value, dtype={tensor.dtype!r})",
        )

    def _in_range(self, name: str, size: int, tensor: TensorType, axis: int) -> int:
        low, high = self.signature.dims[name]
        if not low <= size <= high:
            raise InputError(
                f"dimension {name!r} is {size}; this artifact was compiled for {low} to {high}",
                where=f"axis {axis} of input {tensor.name!r}",
                fix="pad, cut or split the input, or compile again with the range"
                f" {min(low, size)}..{max(high, size)}",
            )
        return size

    def _refuse_size(
        self,
        tensor: TensorType,
        axis: int,
        given: tuple[int, ...],
        dim: int | Expression,
        expected: int,
        origin: Mapping[str, str],
    ) -> None:
        why = f"given {list(given)}, expected {tensor}"
        fix = "pad, cut or split the input, or compile again with this axis named in dynamic="
        if isinstance(dim, Expression):
            sizes = ", ".join(f"{name!r} is set by {origin[name]}" for name in sorted(dim.symbols))
            why += f"; {dim.text} is {expected} here ({sizes})"
            fix = "give all inputs matching shapes"
        raise InputError(
            f"axis {axis} of input {tensor.name!r} is {given[axis]}, expected {expected}",
            why=why,
            fix=fix,
        )


def _widened(value: np.ndarray, dtype: np.dtype, tensor: TensorType) -> np.ndarray:
    if value.dtype.kind in "biu" and dtype.kind in "iu" and np.can_cast(value.dtype, dtype, "safe"):
        return value.astype(dtype)
    raise InputError(
        f"input {tensor.name!r} has dtype {value.dtype}, the model takes {tensor.dtype}",
        why="only integers and booleans are widened; other casts would hide a copy or a loss",
        fix=f"cast it: value.astype({tensor.dtype!r}) in numpy, value.to(torch.{tensor.dtype}) in torch",
    )


def _from_number(value: bool | int | float, tensor: TensorType) -> np.ndarray:
    """A Python number for a 0-d input; it has no dtype that the user chose, so only its kind must fit."""
    try:
        if np.can_cast(np.asarray(value).dtype, tensor.dtype, "same_kind"):
            return np.asarray(value, tensor.dtype)
    except OverflowError:
        pass
    raise InputError(
        f"input {tensor.name!r} is {value!r}, the model takes {tensor.dtype}",
        fix=f"pass a number that {tensor.dtype} can hold",
    )


def _from_torch(value: Any, tensor: TensorType) -> np.ndarray:
    try:
        return value.detach().numpy()
    except (TypeError, RuntimeError) as error:
        raise InputError(
            f"input {tensor.name!r} is a torch tensor that numpy cannot view",
            why=f"{value.dtype} on {value.device}: {error}",
            fix=f"pass a dense CPU tensor of dtype {tensor.dtype}: value.cpu().to(torch.{tensor.dtype})",
        ) from error
