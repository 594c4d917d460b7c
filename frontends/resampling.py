"""Interpolation as tables: which elements of an axis each element of the result is made of, and how much of each.

Resizing is separable in every mode, so an image is resized one axis after the other: `index_select` for the nearest
element, `resample` for a weighted sum. Sizes are static, so the tables are constants; a position embedding that is
resized becomes one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import fx

from tersor.ir import Builder

Array = np.ndarray
COORDINATES: dict[str, Callable[[Array, int, int, float], Array]] = {
    "half_pixel": lambda i, size, out, scale: (i + 0.5) / scale - 0.5,
    "pytorch_half_pixel": lambda i, size, out, scale: (i + 0.5) / scale - 0.5 if out > 1 else 0 * i,
    "half_pixel_symmetric": lambda i, size, out, scale: (
        size / 2 * (1 - out / (scale * size)) + (i + 0.5) / scale - 0.5
    ),
    "asymmetric": lambda i, size, out, scale: i / scale,
    "align_corners": lambda i, size, out, scale: i * ((size - 1) / (out - 1)) if out > 1 else 0 * i,
}
"""Where the elements of the result lie in the source, by the name that ONNX gives the rule (Resize, opset 19)."""

ROUNDING: dict[str, Callable[[Array], Array]] = {
    "round_prefer_floor": lambda x: np.ceil(x - 0.5),
    "round_prefer_ceil": lambda x: np.floor(x + 0.5),
    "floor": np.floor,
    "ceil": np.ceil,
}


@dataclass(frozen=True)
class Taps:
    """``out[o] = sum over t of weights[o, t] * x[positions[o, t]]``; both are [out, taps]."""

    positions: Array
    weights: Array

    @property
    def is_identity(self) -> bool:
        used = self.weights != 0
        return bool(
            (used.sum(1) == 1).all()
            and np.array_equal(self.positions[used], np.arange(len(used)))
            and np.all(self.weights[used] == 1)
        )


def coordinates(size: int, out: int, rule: str, scale: float | None = None) -> Array:
    """Places in an axis of ``size`` for an axis of ``out``; ``scale`` is out / size unless a model says otherwise."""
    return COORDINATES[rule](np.arange(out, dtype=np.float64), size, out, scale or out / size)


def nearest(places: Array, size: int, rounding: str) -> Array:
    """The index of one element for each place."""
    # in float32, like everybody: 3 * (1 / 3) counts as 1
    return np.clip(ROUNDING[rounding](places.astype(np.float32)), 0, size - 1).astype(np.int64)


def linear(places: Array, size: int) -> Taps:
    """Two neighbours, nearer ones weigh more; places outside count as the end."""
    places = np.clip(places, 0, size - 1)
    first = np.floor(places).astype(np.int64)
    share = places - first
    positions = np.stack((first, np.minimum(first + 1, size - 1)), 1)
    return Taps(positions, np.stack((1 - share, share), 1))


def cubic(places: Array, size: int, a: float = -0.75, exclude_outside: bool = False) -> Taps:
    """Four neighbours by cubic convolution (Keys 1981); elements outside repeat the end, or do not count."""
    first = np.floor(places).astype(np.int64)
    positions = first[:, None] + np.arange(-1, 3)
    weights = _keys(positions - places[:, None], a)
    if exclude_outside:
        weights = np.where((positions < 0) | (positions >= size), 0, weights)
        weights = weights / weights.sum(1, keepdims=True)
    return Taps(np.clip(positions, 0, size - 1), weights)


def smoothed(
    size: int, out: int, scale: float | None, order: int, a: float = -0.5, exclude_outside: bool = True
) -> Taps:
    """Linear (order 1) or cubic (order 3) interpolation over all that an element covers, like Pillow's."""
    step = 1 / (scale or out / size)
    wide = max(step, 1.0)
    support = (order + 1) / 2 * wide
    centre = step * (np.arange(out) + 0.5)
    start = np.floor(centre - support + 0.5).astype(np.int64)
    end = np.floor(centre + support + 0.5).astype(np.int64)
    positions = start[:, None] + np.arange(int((end - start).max()))
    distance = (positions + 0.5 - centre[:, None]) / wide
    weights = np.maximum(1 - np.abs(distance), 0) if order == 1 else _keys(distance, a)
    weights = np.where(positions < end[:, None], weights, 0)
    if exclude_outside:
        weights = np.where((positions < 0) | (positions >= size), 0, weights)
    return Taps(np.clip(positions, 0, size - 1), weights / weights.sum(1, keepdims=True))


def bins(size: int, out: int) -> Taps:
    """Means over ``out`` ranges that cover an axis, as adaptive pooling cuts it; repeated positions weigh nothing."""
    start = np.arange(out) * size // out
    end = -(-(np.arange(1, out + 1) * size) // out)
    positions = start[:, None] + np.arange(int((end - start).max()))
    weights = (positions < end[:, None]) / (end - start)[:, None]
    return Taps(np.minimum(positions, end[:, None] - 1), weights)


def _keys(distance: Array, a: float) -> Array:
    x = np.abs(distance)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0))


def select(build: Builder, x: fx.Node, dim: int, positions: Array) -> fx.Node:
    """x at these positions of an axis, whose shape takes its place."""
    if np.array_equal(positions, np.arange(x.meta["value"].shape[dim])):
        return x
    return build.index_select(x, build.parameter("positions", torch.from_numpy(positions)), dim=dim)


def resample(build: Builder, x: fx.Node, dim: int, taps: Taps) -> fx.Node:
    """x with one axis made by the taps."""
    if taps.is_identity:
        return x
    positions = build.parameter("positions", torch.from_numpy(taps.positions))
    weights = torch.from_numpy(taps.weights).to(x.meta["value"].torch_dtype)
    return build.resample(x, positions, build.parameter("weights", weights), dim=dim)
