"""Layouts of constant weights: numpy functions that pack them once, at compile time, and undo it.

A *panel* is as many output columns as one register tile is wide. GEMM weights are stored panel after panel, inside a
panel row k after row k, so that a kernel reads them as one linear stream: ``[ceil(N / columns)][K][width]``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def packed_shape(n: int, k: int, panel: int, weights: int = 1) -> tuple[int, int, int]:
    """Shape of ``weights`` matrices [n, k] packed together into panels of ``panel`` columns in all."""
    return -(-n // (panel // weights)), k, panel


def pack(weights: Sequence[np.ndarray], panel: int) -> np.ndarray:
    """Pack matrices [N, K] (as of ``linear``: out = x @ w.T) for a kernel with as many accumulators.

    Each matrix gets ``panel // len(weights)`` columns of every panel, side by side; N is padded with zeros.
    ValueError when the matrices differ in shape or do not divide the panel.
    """
    if len({w.shape for w in weights}) != 1 or panel % len(weights):
        raise ValueError(f"cannot pack shapes {[w.shape for w in weights]} into panels of {panel} columns")
    n, k = weights[0].shape
    columns = panel // len(weights)
    packed = np.empty(packed_shape(n, k, panel, len(weights)), weights[0].dtype)
    full = n // columns
    for index, weight in enumerate(weights):
        part = packed[:, :, index * columns : (index + 1) * columns]
        part[:full] = weight[: full * columns].reshape(full, columns, k).transpose(0, 2, 1)
        if full < len(packed):
            part[full] = 0
            part[full, :, : n - full * columns] = weight[full * columns :].T
    return packed


def unpack(packed: np.ndarray, n: int, weights: int = 1) -> list[np.ndarray]:
    """The matrices [n, K] that ``pack`` was given."""
    panels, k, panel = packed.shape
    columns = panel // weights
    return [
        packed[:, :, index * columns : (index + 1) * columns].transpose(0, 2, 1).reshape(-1, k)[:n].copy()
        for index in range(weights)
    ]
