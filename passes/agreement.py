"""How near values are to the ones that they should be."""

from __future__ import annotations

import math

import torch


class Agreement:
    """Power of what was wanted, of what came, and of the difference, over any number of pairs of tensors."""

    def __init__(self) -> None:
        self.signal = self.noise = self._dot = self._power = 0.0

    def add(self, wanted: torch.Tensor, actual: torch.Tensor) -> None:
        """Takes in two tensors of one shape; computed in float64."""
        wanted, actual = wanted.double(), actual.double()
        self.signal += wanted.square().sum().item()
        self.noise += (actual - wanted).square().sum().item()
        self._dot += (actual * wanted).sum().item()
        self._power += actual.square().sum().item()

    @property
    def sqnr_db(self) -> float:
        """Signal to noise in decibels; infinite without a difference."""
        if not self.noise:
            return math.inf
        return 10 * math.log10(self.signal / self.noise) if self.signal else -math.inf

    @property
    def cosine(self) -> float:
        """Of all values as one vector; 0 where one of both is zero."""
        return self._dot / math.sqrt(self.signal * self._power) if self.signal and self._power else 0.0
