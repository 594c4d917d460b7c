"""Weights as the generated code reads them: which stored parameters, in which layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from tersor.codegen import packing
from tersor.codegen.kernels.base import TensorSpec
from tersor.ir.dims import product
from tersor.ir.parameters import ParameterStore


@dataclass(frozen=True)
class Weight:
    """One or several parameters of the program in one tensor, plain or packed into panels for a GEMM.

    sources: names in the program's store; an int stands for that many zeros (an absent bias).
    panel: columns of a packed panel; None is the plain row-major layout.
    join: several sources are "stacked" along their first dimension, or put "beside" each other in every panel.
    words: how a packed panel gathers elements; None for 32 bits.
    """

    sources: tuple[str | int, ...]
    panel: int | None = None
    join: Literal["stacked", "beside"] = "stacked"
    words: packing.Words | None = None

    @property
    def name(self) -> str:
        """A name unique for this description: the sources, marked with what was done to them."""
        names = ("+" if self.join == "stacked" else "&").join(map(str, self.sources))
        if self.panel is None:
            return names
        gathered = f"x{self.words.elements}" if self.words else ""
        gathered += f"sums{self.words.sums}" if self.words and self.words.sums else ""
        return f"{names}|packed{self.panel}{gathered}"

    def spec(self, store: ParameterStore) -> TensorSpec:
        """Shape and dtype in this layout."""
        known = [store[s].value for s in self.sources if isinstance(s, str)]
        shape, dtype = known[0].shape, known[0].dtype
        if len(self.sources) > 1 and self.join == "stacked":
            shape = (
                sum(s if isinstance(s, int) else store[s].value.shape[0] for s in self.sources),
                *shape[1:],
            )
        if self.panel is None:
            dtype = {"bfloat16": "uint16"}.get(dtype, dtype)  # which numpy lacks
        else:
            beside = len(self.sources) if self.join == "beside" else 1
            shape, dtype = packing.packed(shape[0], product(shape[1:]), dtype, self.panel, beside, self.words)
        return TensorSpec(shape, dtype)

    def load(self, store: ParameterStore) -> np.ndarray:
        """The contents in this layout."""
        known = {s: _array(store[s].tensor) for s in self.sources if isinstance(s, str)}
        dtype = next(iter(known.values())).dtype
        arrays = [np.zeros(s, dtype) if isinstance(s, int) else known[s] for s in self.sources]
        if len(arrays) > 1 and self.join == "stacked":
            arrays = [np.concatenate(arrays)]
        if self.panel is None:
            return arrays[0]
        return packing.pack([a.reshape(len(a), -1) for a in arrays], self.panel, self.words)


def _array(tensor: torch.Tensor) -> np.ndarray:
    """The tensor's contents; bf16, which numpy lacks, as its bit patterns."""
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
