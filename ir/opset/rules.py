"""Shape and dtype rules shared by the operations."""

from __future__ import annotations

from typing import Any

import torch

from tersor.errors import ProgramError
from tersor.ir.dims import Dim, Shape
from tersor.ir.value import DTYPE_NAMES, Value


def axis(dim: int, rank: int) -> int:
    """A dimension index in 0..rank-1; negative ones count from the end."""
    if not -rank <= dim < rank:
        raise ProgramError(f"dimension {dim} is out of range for rank {rank}")
    return dim % rank


def broadcast(*shapes: Shape) -> Shape:
    """Numpy's broadcasting; two symbolic dimensions go together only when they are equal."""
    rank = max(map(len, shapes))
    result: list[int | Dim] = []
    for i in range(rank):
        size: int | Dim = 1
        for shape in shapes:
            j = i - rank + len(shape)
            dim = shape[j] if j >= 0 else 1
            if dim == 1 or dim == size:
                continue
            if size != 1:
                raise ProgramError(f"shapes {' and '.join(map(show, shapes))} do not broadcast")
            size = dim
        result.append(size)
    return tuple(result)


def show(shape: Shape) -> str:
    return f"[{', '.join(map(str, shape))}]"


def promote(*operands: Any) -> str:
    """torch's type promotion of `Value`s and Python numbers."""
    probes = [
        torch.empty((1,) if v.rank else (), dtype=v.torch_dtype) if isinstance(v, Value) else v
        for v in operands
    ]
    dtype = (
        probes[0].dtype
        if isinstance(probes[0], torch.Tensor)
        else torch.result_type(torch.empty(()), probes[0])
    )
    if len(probes) > 1:
        tensor = probes[0]
        for probe in probes[1:]:
            dtype = torch.result_type(tensor, probe)
            ranked = any(isinstance(p, torch.Tensor) and p.ndim for p in (tensor, probe))
            tensor = torch.empty((1,) if ranked else (), dtype=dtype)
    return DTYPE_NAMES[dtype]


def operand_shapes(*operands: Any) -> list[Shape]:
    """The shapes of operands; numbers are scalars."""
    return [v.shape if isinstance(v, Value) else () for v in operands]


def same_float(x: Value) -> Value:
    """The result looks like the operand, which is floating point."""
    require_float("operand", x)
    return x


def require_float(what: str, value: Value) -> None:
    if not value.is_float:
        raise ProgramError(f"{what} {value} is not floating point")


def require_dtype(dtype: str, **operands: Value | None) -> None:
    """Operands that torch does not promote: all that are there have this type."""
    for name, value in operands.items():
        if value is not None and value.dtype != dtype:
            raise ProgramError(f"{name} is {value}, expected {dtype}")


def window_positions(size: int | Dim, kernel: int, stride: int, padding: int, dilation: int) -> int | Dim:
    """How many windows fit along an axis of ``size`` that is padded on both ends."""
    span = size + 2 * padding - dilation * (kernel - 1) - 1
    if isinstance(span, Dim) and not span.divisible(stride):
        raise ProgramError(
            f"windows with stride {stride} over the dimension {size} have no exact number",
            fix="make it static",
        )
    if isinstance(span, int) and span < 0:
        raise ProgramError(f"a window of {kernel} (dilation {dilation}) is larger than its input of {size}")
    return span // stride + 1
