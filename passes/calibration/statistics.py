"""Statistics of a value over calibration data, gathered row by row in bounded memory.

A row is what the value holds for one token (or patch, or sample): its last dimension. An empty statistic says what is
wanted; the sweep fills a fresh one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import ClassVar, Self

import torch

CHUNK = 4096
"""Rows that are handled at once."""

SPAN = 512
"""Channels of a Gram matrix that are multiplied with all before them at once."""


@dataclass
class Statistic(ABC):
    """One kind of figures. ``count`` is the number of rows seen.

    Two statistics are equal when they ask for the same: same kind, same ``options``.
    """

    count: int = field(default=0, kw_only=True)

    options: ClassVar[tuple[str, ...]] = ()

    @property
    def key(self) -> str:
        """Names the kind and its options."""
        chosen = ",".join(f"{name}={getattr(self, name)}" for name in self.options)
        return f"{type(self).__name__}({chosen})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Statistic) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def fresh(self) -> Self:
        """An empty statistic that asks for the same."""
        return type(self)(**{name: getattr(self, name) for name in self.options})

    def update(self, rows: torch.Tensor, generator: torch.Generator) -> None:
        """Takes in rows [n, channels]; ``generator`` decides what is random about it."""
        for chunk in rows.split(CHUNK):
            self._take(chunk, generator)
            self.count += len(chunk)

    @abstractmethod
    def _take(self, rows: torch.Tensor, generator: torch.Generator) -> None: ...

    def state(self) -> dict[str, torch.Tensor]:
        """The figures as tensors by name."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: torch.as_tensor(t) for name, t in tensors.items() if t is not None}

    def restore(self, state: Mapping[str, torch.Tensor]) -> Self:
        """Takes figures as `state` gave them in place of its own; returns itself."""
        for name, tensor in state.items():
            setattr(self, name, tensor if tensor.ndim else tensor.item())
        return self


@dataclass(eq=False)
class MinMax(Statistic):
    """Smallest and largest value of each channel."""

    low: torch.Tensor | None = None
    high: torch.Tensor | None = None

    @property
    def absmax(self) -> torch.Tensor:
        """Largest magnitude of each channel."""
        return torch.maximum(self.low.abs(), self.high.abs())

    def _take(self, rows: torch.Tensor, generator: torch.Generator) -> None:
        low, high = rows.aminmax(dim=0)
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)


def no_range(extent: MinMax | None, value: str) -> str | None:
    """Why data says nothing of the range of a value; None where it does. ``value`` is in words: "its input"."""
    if extent is None:
        return "no calibration data reaches it"
    return None if (extent.high > extent.low).any() else f"{value} is the same for all calibration data"


@dataclass(eq=False)
class Moments(Statistic):
    """Mean, mean magnitude and mean square (energy) of each channel, in float64."""

    sums: torch.Tensor | None = None  # [3, channels]

    @property
    def mean(self) -> torch.Tensor:
        return self.sums[0] / self.count

    @property
    def mean_abs(self) -> torch.Tensor:
        return self.sums[1] / self.count

    @property
    def energy(self) -> torch.Tensor:
        return self.sums[2] / self.count

    def _take(self, rows: torch.Tensor, generator: torch.Generator) -> None:
        rows = rows.double()
        sums = torch.stack((rows.sum(0), rows.abs().sum(0), rows.square().sum(0)))
        self.sums = sums if self.sums is None else self.sums + sums


@dataclass(eq=False)
class Histogram(Statistic):
    """How often values of all channels together fall into ``bins`` equal bins over [-reach, reach].

    ``reach`` doubles when a value lies beyond it, and pairs of bins merge, so counts stay exact and a bin is at most
    4 / bins of the largest magnitude wide.
    """

    bins: int = 4096
    counts: torch.Tensor | None = None
    reach: float = 0.0

    options = ("bins",)

    @property
    def centers(self) -> torch.Tensor:
        """The middle of each bin."""
        return (torch.arange(self.bins, dtype=torch.float64) + 0.5) * (
            2 * self.reach / self.bins
        ) - self.reach

    def percentile(self, fraction: float) -> tuple[float, float]:
        """The range that leaves (1 - fraction) / 2 of the values beyond either end, to within a bin."""
        cumulated = self.counts.cumsum(0).double() / self.counts.sum()
        width, tail = 2 * self.reach / self.bins, (1 - fraction) / 2
        low = int((cumulated > tail).nonzero()[0])
        high = int((cumulated >= 1 - tail).nonzero()[0])
        return low * width - self.reach, (high + 1) * width - self.reach

    def _take(self, rows: torch.Tensor, generator: torch.Generator) -> None:
        largest = rows.abs().max().item()
        if self.counts is None:
            self.counts = torch.zeros(self.bins, dtype=torch.int64)
        if not self.reach:
            if largest == 0:  # no scale yet: zeros lie in the middle of any
                self.counts[self.bins // 2] += rows.numel()
                return
            self.reach = 2.0 ** (torch.tensor(largest).log2().ceil().item())
        while largest > self.reach:
            self.reach *= 2
            inner = self.counts.reshape(-1, 2).sum(1)
            self.counts = torch.zeros_like(self.counts)
            self.counts[self.bins // 4 : self.bins // 4 + self.bins // 2] = inner
        position = ((rows.double() / self.reach + 1) * (self.bins / 2)).long().clamp(0, self.bins - 1)
        self.counts += torch.bincount(position.reshape(-1), minlength=self.bins)


@dataclass(eq=False)
class Gram(Statistic):
    """X^T X over all rows X [n, channels], of which it keeps the lower half.

    Products of up to 4096 rows are formed in float32 (float64 for float64 values) and added up in float64: an entry is
    off by at most 1e-5 sqrt(g_ii g_jj), whatever the number of rows.
    """

    half: torch.Tensor | None = None  # right up to the diagonal

    @property
    def total(self) -> torch.Tensor:
        """The whole matrix, float64 [channels, channels]."""
        return self.half.tril() + self.half.tril(-1).T

    def _take(self, rows: torch.Tensor, generator: torch.Generator) -> None:
        rows = rows if rows.dtype == torch.float64 else rows.float()
        if self.half is None:
            self.half = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
        for start in range(0, rows.shape[1], SPAN):
            end = start + SPAN
            self.half[start:end, :end] += rows[:, start:end].T @ rows[:, :end]


@dataclass(eq=False)
class Samples(Statistic):
    """Up to ``limit`` rows, each with the same chance, in order of appearance (reservoir sampling)."""

    limit: int = 512
    rows: torch.Tensor | None = None
    lots: torch.Tensor | None = None  # each row's random number; the largest stay

    options = ("limit",)

    def _take(self, rows: torch.Tensor, generator: torch.Generator) -> None:
        lots = torch.rand(len(rows), generator=generator, dtype=torch.float64)
        before = 0 if self.rows is None else len(self.rows)
        lots = lots if self.rows is None else torch.cat((self.lots, lots))
        kept = lots.topk(min(self.limit, len(lots))).indices.sort().values
        new = rows[kept[kept >= before] - before]
        self.rows = new if self.rows is None else torch.cat((self.rows[kept[kept < before]], new))
        self.lots = lots[kept]
