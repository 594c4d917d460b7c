"""What rounding to few codes costs at one place, simulated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from tersor.passes.quantize.grid import Grid

Activations = Literal["tensor", "token"]


@dataclass(frozen=True)
class Rounding:
    """How a place is going to be quantized.

    Attributes:
        bits: of weights and activations.
        activations: "tensor": one grid of any zero point for the value, fixed by its range; "token": a symmetric one
            for every row, found while the model runs. Weights have a symmetric grid per row.
    """

    bits: int = 8
    activations: Activations = "tensor"


@dataclass(frozen=True)
class Observed:
    """What is known of a value: range of each channel, rows to fit to, rows to judge by, weights that multiply it.

    Shapes: low, high, absmax [channels]; fit, held_out [n, channels]; weights [outputs, channels] each.
    """

    low: torch.Tensor
    high: torch.Tensor
    fit: torch.Tensor
    held_out: torch.Tensor
    weights: Sequence[torch.Tensor]

    @property
    def absmax(self) -> torch.Tensor:
        return torch.maximum(self.low.abs(), self.high.abs())

    @property
    def weight_absmax(self) -> torch.Tensor:
        """Largest magnitude in each column over all weights [channels]."""
        return torch.stack([w.abs().amax(0) for w in self.weights]).amax(0)


def rounding_error(
    observed: Observed,
    rows: torch.Tensor,
    rounding: Rounding,
    s: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
) -> float:
    """||Q((x - z) / s) Q(W s)^T + W z - x W^T||^2 / ||x W^T||^2, the mean over the weights W.

    The range of activations is that of ``observed``, also for rows beyond it.
    """
    low, high, x = observed.low, observed.high, rows
    if z is not None:
        low, high, x = low - z, high - z, x - z
    if s is not None:
        low, high, x = low / s, high / s, x / s
    weight_grid = Grid(rounding.bits)
    if rounding.activations == "tensor":
        grid = Grid(rounding.bits, symmetric=False)
        scale, zero = grid.fit(low.min(), high.max())
    else:
        grid = Grid(rounding.bits)
        scale, zero = grid.fit_rows(x)
        scale, zero = scale.unsqueeze(1), zero.unsqueeze(1)
    rounded = grid.round_trip(x, scale, zero)
    errors = []
    for weight in observed.weights:
        columns = weight if s is None else weight * s
        steps, _ = weight_grid.fit_rows(columns)
        exact = rows @ weight.T
        result = rounded @ weight_grid.round_trip(columns, steps.unsqueeze(1)).T
        if z is not None:
            result = result + weight @ z
        power = exact.square().sum().item()
        errors.append((result - exact).square().sum().item() / power if power else 0.0)
    return sum(errors) / len(errors)
