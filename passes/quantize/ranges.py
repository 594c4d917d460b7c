"""Which range a grid should cover, chosen from the distribution of the values."""

from __future__ import annotations

from typing import Literal

import torch

from tersor.passes.calibration import Histogram, MinMax
from tersor.passes.quantize.grid import Grid

Method = Literal["minmax", "percentile", "mse"]

STEPS = 100
"""Ranges that the search tries, from the whole one down to 1 / STEPS of it."""


def choose_range(
    method: Method, grid: Grid, extent: MinMax, histogram: Histogram, percentile: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point (f32, shape ()) of one grid for all channels.

    minmax: everything that was seen. percentile: what lies beyond it on either side is clipped to the end. mse: the
    fraction of the whole range with the least mean square error on the histogram (the search of Wei et al. 2022 and
    others; `STEPS` fractions).
    """
    low, high = extent.low.min(), extent.high.max()
    if method == "percentile":
        bottom, top = histogram.percentile(percentile)
        low, high = low.clamp(min=bottom), high.clamp(max=top)
    if method == "mse":
        fraction = _least_error(grid, low, high, histogram)
        low, high = low * fraction, high * fraction
    return grid.fit(low, high)


def clipped_rows(
    grid: Grid, values: torch.Tensor, group: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `Grid.fit_rows`, for ranges that lose least: rows [N, K] -> [N], or groups of K -> [N, K / group].

    Of the fractions 1, .99, ... .21 of each range the one with the least sum of |error|^2.4, as in the published GPTQ
    (Frantar et al. 2023). ValueError when the groups do not divide the rows.
    """
    if group is not None and values.shape[-1] % group:
        raise ValueError(f"rows of {values.shape[-1]} are not made of groups of {group}")
    parts = values if group is None else values.unflatten(-1, (-1, group))
    low, high = parts.amin(-1), parts.amax(-1)
    scale, zero = grid.fit(low, high)
    least = torch.full_like(scale, torch.inf)
    for step in range(round(0.8 * STEPS)):
        fraction = 1 - step / STEPS
        tried, offset = grid.fit(low * fraction, high * fraction)
        errors = (
            (grid.round_trip(parts, tried[..., None], offset[..., None]) - parts).abs_().pow_(2.4).sum(-1)
        )
        better = errors < least
        least = torch.where(better, errors, least)
        scale, zero = torch.where(better, tried, scale), torch.where(better, offset, zero)
    return scale, zero


def rounding_error(
    grid: Grid, scale: torch.Tensor, zero: torch.Tensor, extent: MinMax, histogram: Histogram
) -> float:
    """||Q(x) - x||^2 / ||x||^2 over all values x seen, for one grid; 0 where all of them are."""
    low, high = extent.low.min(), extent.high.max()
    errors, power = _errors(grid, scale.reshape(1), zero.reshape(1), low, high, histogram)
    return (errors[0] / power).item() if power else 0.0


def _least_error(grid: Grid, low: torch.Tensor, high: torch.Tensor, histogram: Histogram) -> torch.Tensor:
    """The fraction of a range that loses least."""
    fractions = torch.arange(STEPS, 0, -1) / STEPS
    errors, _ = _errors(grid, *grid.fit(low * fractions, high * fractions), low, high, histogram)
    return fractions[errors.argmin()]


def _errors(
    grid: Grid, scale: torch.Tensor, zero: torch.Tensor, low: torch.Tensor, high: torch.Tensor, histogram: Histogram
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Sums of squared errors of grids [n], and of squared values, over a histogram of values from low to high."""
    filled = histogram.counts > 0
    values, counts = histogram.centers[filled], histogram.counts[filled].double()
    # the ends of a bin may lie beyond what was seen
    values = values.clamp(low.double(), high.double())
    back = grid.round_trip(values, scale[:, None].double(), zero[:, None].double())
    return ((back - values).square() * counts).sum(1), (values.square() * counts).sum()
