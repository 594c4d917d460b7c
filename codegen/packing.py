"""Layouts of constant weights: numpy functions that pack them once, at compile time, and undo it.

Weights are packed as 32-bit *words* of elements that are neighbours along K: one f32, two bf16 or four int8, the
first in the lowest bits. A *panel* is as many output columns as one register tile is wide. GEMM weights are stored
panel after panel, inside a panel word k after word k, so that a kernel reads them as one linear stream:
``[ceil(N / columns)][ceil(K / elements of a word)][width]``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

ELEMENTS = {"float32": 1, "bfloat16": 2, "int8": 4}
"""Dtypes of weights that can be packed, with how many elements make a word."""


def packed(n: int, k: int, dtype: str, panel: int, weights: int = 1) -> tuple[tuple[int, int, int], str]:
    """Shape and dtype of ``weights`` matrices [n, k] packed together into panels of ``panel`` columns in all."""
    shape = (-(-n // (panel // weights)), -(-k // ELEMENTS[dtype]), panel)
    return shape, "float32" if dtype == "float32" else "int32"


def pack(weights: Sequence[np.ndarray], panel: int) -> np.ndarray:
    """Pack matrices [N, K] (as of ``linear``: out = x @ w.T) for a kernel with as many accumulators.

    Matrices are float32, int8 or bfloat16, the last also as uint16 bit patterns (numpy has no bfloat16 of its own).
    Each gets ``panel // len(weights)`` columns of every panel, side by side; N and K are padded with zeros.
    ValueError when the matrices differ in shape or dtype or do not divide the panel.
    """
    if len({(w.shape, w.dtype) for w in weights}) != 1 or panel % len(weights):
        described = [f"{w.dtype} {w.shape}" for w in weights]
        raise ValueError(f"cannot pack {', '.join(described)} into panels of {panel} columns")
    (n, k), dtype = weights[0].shape, _element(weights[0])
    columns = panel // len(weights)
    shape, word = packed(n, k, dtype, panel, len(weights))
    result = np.empty(shape, word)
    full = n // columns
    for index, weight in enumerate(weights):
        words = _words(weight, ELEMENTS[dtype], word)
        part = result[:, :, index * columns : (index + 1) * columns]
        part[:full] = words[: full * columns].reshape(full, columns, shape[1]).transpose(0, 2, 1)
        if full < len(result):
            part[full] = 0
            part[full, :, : n - full * columns] = words[full * columns :].T
    return result


def unpack(words: np.ndarray, n: int, k: int, dtype: str, weights: int = 1) -> list[np.ndarray]:
    """The matrices [n, k] of this dtype that ``pack`` was given; bfloat16 as uint16 bit patterns."""
    panels, _, panel = words.shape
    columns = panel // weights
    element = {"bfloat16": "uint16"}.get(dtype, dtype)
    matrices = []
    for index in range(weights):
        part = words[:, :, index * columns : (index + 1) * columns]
        rows = np.ascontiguousarray(part.transpose(0, 2, 1)).reshape(panels * columns, -1)
        matrices.append(rows.view(element)[:n, :k].copy())
    return matrices


def _element(weight: np.ndarray) -> str:
    name = {"uint16": "bfloat16"}.get(str(weight.dtype), str(weight.dtype))
    if name not in ELEMENTS:
        raise ValueError(f"weights of dtype {weight.dtype} cannot be packed; known: {', '.join(ELEMENTS)}")
    return name


def _words(weight: np.ndarray, elements: int, word: str) -> np.ndarray:
    """The rows as words, the last one padded with zeros."""
    missing = -weight.shape[1] % elements
    whole = np.pad(weight, ((0, 0), (0, missing))) if missing else np.ascontiguousarray(weight)
    return whole.view(word)
