"""What rounding to few codes costs at one place, simulated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from tersor.passes.quantize.grid import Grid, group_size

Activations = Literal["tensor", "token"]


@dataclass(frozen=True)
class Rounding:
    """How a place is going to be quantized.

    Attributes:
        bits: of weights and activations.
        activations: "tensor": one grid of any zero point for the value, fixed by its range; "token": a symmetric one
            for every row, or for every group of channels in it, found while the model runs. Weights have a symmetric
            grid per row.
        group: most channels of such a group (`group_size`); None: all share a grid.
    """

    bits: int = 8
    activations: Activations = "tensor"
    group: int | None = None


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


class Trial:
    """Rounding errors at one place, always on the same rows [n, channels]."""

    def __init__(self, observed: Observed, rows: torch.Tensor, rounding: Rounding):
        self._observed, self._rows, self._rounding = observed, rows, rounding
        self._exact = [rows @ weight.T for weight in observed.weights]
        tiny = torch.finfo(torch.float32).tiny  # no division by 0 where all outputs are
        self._power = [exact.square().sum(1).clamp(min=tiny) for exact in self._exact]

    def error(self, s: torch.Tensor | None = None, z: torch.Tensor | None = None) -> float:
        """||Q((x - z) / s) Q(W s)^T + W z - x W^T||^2 / ||x W^T||^2, the mean over the weights W.

        The range of activations is the observed one, also for rows beyond it.
        """
        return sum(part.sum().item() / p.sum().item() for part, p in self._parts(s, z)) / len(self._exact)

    def error_of_a_row(self, s: torch.Tensor | None = None, z: torch.Tensor | None = None) -> float:
        """The same, each row against its own outputs, the mean over the rows."""
        return sum((part / p).mean().item() for part, p in self._parts(s, z)) / len(self._exact)

    def _parts(
        self, s: torch.Tensor | None, z: torch.Tensor | None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """For each weight the power [n] of each row's error and of its outputs."""
        rounded, grid = self._activations(s, z), Grid(self._rounding.bits)
        for weight, exact, power in zip(self._observed.weights, self._exact, self._power, strict=True):
            columns = weight if s is None else weight * s
            steps, _ = grid.fit_rows(columns)
            result = rounded @ grid.round_trip(columns, steps.unsqueeze(1)).T
            if z is not None:
                result += weight @ z
            yield result.sub_(exact).square_().sum(1), power

    def _activations(self, s: torch.Tensor | None, z: torch.Tensor | None) -> torch.Tensor:
        low, high, x = self._observed.low, self._observed.high, self._rows
        if z is not None:
            low, high, x = low - z, high - z, x - z
        if s is not None:
            low, high, x = low / s, high / s, x / s
        if self._rounding.activations == "tensor":
            grid = Grid(self._rounding.bits, symmetric=False)
            return grid.round_trip(x, *grid.fit(low.min(), high.max()))
        grid, group = Grid(self._rounding.bits), group_size(x.shape[1], self._rounding.group) or x.shape[1]
        steps, _ = grid.fit_rows(x, group)
        return grid.round_trip(x.unflatten(1, (-1, group)), steps.unsqueeze(2)).flatten(1)
