"""What is known of a value in a program: its dtype and its shape over named dimensions."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tersor.errors import ProgramError
from tersor.ir.dims import Dim, Shape, product

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "int32": torch.int32,
    "int16": torch.int16,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "bool": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Value:
    """A tensor of ``dtype`` (a name such as "float32") and ``shape`` (ints and symbolic dimensions)."""

    dtype: str
    shape: Shape

    @staticmethod
    def of(tensor: torch.Tensor) -> Value:
        if tensor.dtype not in DTYPE_NAMES:
            raise ProgramError(
                f"a tensor of {tensor.dtype} cannot be part of a program", fix=f"use {', '.join(DTYPES)}"
            )
        return Value(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def elements(self) -> int | Dim:
        return product(self.shape)

    @property
    def bytes(self) -> int | Dim:
        return self.elements * self.torch_dtype.itemsize

    @property
    def is_float(self) -> bool:
        return self.torch_dtype.is_floating_point

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"
