"""Grids: which values the codes of a number of bits stand for (METHODS and passes share this one definition).

A code c stands for ``(c - zero_point) * scale``; zero is always exactly a code, so padding and ReLU stay exact.
Rounding is to the nearest code, halves to even, as `tersor.ir.opset.quantization` defines it for programs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from tersor.ir.opset.quantization import SMALLEST_GROUP

Numbers = TypeVar("Numbers", torch.Tensor, np.ndarray)

GROUP = 128
"""Channels of a token that share a scale: a product of codes takes about 5 % longer than with one scale for all."""


@dataclass(frozen=True)
class Grid:
    """Codes of ``bits`` bits.

    symmetric: codes -(2^(bits-1) - 1) .. 2^(bits-1) - 1 around the zero point 0 (one code is left out, so that a value
        and its negative are equally far from theirs); otherwise 0 .. 2^bits - 1 with any whole zero point.
    """

    bits: int = 8
    symmetric: bool = True

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"grids have 2 to 8 bits, not {self.bits}")

    @property
    def low(self) -> int:
        return -self.high if self.symmetric else 0

    @property
    def high(self) -> int:
        return 2 ** (self.bits - 1) - 1 if self.symmetric else 2**self.bits - 1

    @property
    def dtype(self) -> str:
        """The type that holds the codes."""
        return "int8" if self.symmetric else "uint8"

    def fit(self, low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero point (f32, whole) of grids that reach from ``low`` to ``high``, element by element.

        The range is widened to include zero; a range that is only zero has the scale 1.
        """
        low, high = low.clamp(max=0.0).float(), high.clamp(min=0.0).float()
        if self.symmetric:
            scale = torch.maximum(-low, high) / self.high
        else:
            scale = (high - low) / self.high
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        zero = torch.zeros_like(scale) if self.symmetric else torch.round(-low / scale).clamp(0, self.high)
        return scale, zero

    def fit_rows(self, values: torch.Tensor, group: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero point of every row [N, K] -> [N], or of every ``group`` of K -> [N, K / group].

        ValueError when the groups do not divide the rows.
        """
        if group is not None:
            if values.shape[-1] % group:
                raise ValueError(f"rows of {values.shape[-1]} are not made of groups of {group}")
            values = values.unflatten(-1, (-1, group))
        return self.fit(values.amin(-1), values.amax(-1))

    def codes(self, values: Numbers, scale: Numbers, zero: Numbers | float = 0.0) -> Numbers:
        """The nearest codes, as whole floats; ``scale`` and ``zero`` broadcast."""
        return ((values * (1 / scale)).round() + zero).clip(self.low, self.high)

    def round_trip(
        self, values: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | float = 0.0
    ) -> torch.Tensor:
        """What the nearest codes stand for."""
        return (self.codes(values, scale, zero) - zero) * scale


def group_size(channels: int, most: int | None) -> int | None:
    """The largest group of whole `SMALLEST_GROUP`s that divides the channels, of at most ``most`` of them.

    None where all channels share a scale: they are no more than that, ``most`` is None, or there is no such group of at
    least a quarter of it (each costs as much as some products).
    """
    if most is None or channels <= most:
        return None
    sizes = range(most // SMALLEST_GROUP * SMALLEST_GROUP, (most - 1) // 4, -SMALLEST_GROUP)
    return next((size for size in sizes if channels % size == 0), None)


def group_problem(group: int | None) -> str | None:
    """What is wrong with an option of the most channels of a token that share a scale."""
    if group is None or group >= SMALLEST_GROUP:
        return None
    return f"group = {group} should be None, or at least {SMALLEST_GROUP}"
