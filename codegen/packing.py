"""Layouts of constant weights: numpy functions that pack them once, at compile time, and undo it.

Weights are packed as *words* of elements that are neighbours along K: one f32, one fp16 (16 bits), two bf16 or four
int8, the first in the lowest bits; some instructions want more int8 numbers side by side (`Words`). A *panel* is as
many output columns as one register tile is wide. GEMM weights are stored panel after panel, inside a panel word k after
word k, so that a kernel reads them as one linear stream:
``[ceil(N / columns)][ceil(K / elements of a word)][width]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

ELEMENTS = {"float32": 1, "float16": 1, "bfloat16": 2, "int8": 4}
"""Dtypes of weights that can be packed, with how many elements make a word."""

STORED = {"float32": "float32", "float16": "float16", "bfloat16": "int32", "int8": "int32"}
"""Dtype of the words that such elements make."""


OFFSET = 128
"""What is taken from unsigned codes to multiply them as signed ones."""


@dataclass(frozen=True)
class Words:
    """How the elements of a row are gathered.

    elements: neighbours along K that lie side by side.
    signed: they are multiplied by codes less `OFFSET`.
    sums: of so many equal parts of K each panel has a row of words at its end, the int32 sums of its columns times
    `OFFSET`: by these, products of codes and of codes less `OFFSET` differ. They are added where signed words stand for
    products of codes, and taken off where unsigned ones stand for those of codes less `OFFSET` (groups).
    """

    elements: int
    signed: bool = False
    sums: int = 0


def packed(
    n: int, k: int, dtype: str, panel: int, weights: int = 1, words: Words | None = None
) -> tuple[tuple[int, int, int], str]:
    """Shape and dtype of ``weights`` matrices [n, k] packed together into panels of ``panel`` columns in all.

    ``words``: None is `ELEMENTS`, without sums.
    """
    words = words or Words(ELEMENTS[dtype])
    width = panel * (words.elements // ELEMENTS[dtype])
    shape = (-(-n // (panel // weights)), -(-k // words.elements) + words.sums, width)
    return shape, STORED[dtype]


def pack(weights: Sequence[np.ndarray], panel: int, words: Words | None = None) -> np.ndarray:
    """Pack matrices [N, K] (as of ``linear``: out = x @ w.T) for a kernel with as many accumulators.

    Matrices are float32, float16, int8 or bfloat16, the last also as uint16 bit patterns (numpy has no bfloat16 of its
    own). Each gets ``panel // len(weights)`` columns of every panel, side by side; N and K are padded with zeros.
    ``words``: None is `ELEMENTS`, without sums.
    ValueError when the matrices differ in shape or dtype or do not divide the panel.
    """
    if len({(w.shape, w.dtype) for w in weights}) != 1 or panel % len(weights):
        described = [f"{w.dtype} {w.shape}" for w in weights]
        raise ValueError(f"cannot pack {', '.join(described)} into panels of {panel} columns")
    (n, k), dtype = weights[0].shape, _element(weights[0])
    words = words or Words(ELEMENTS[dtype])
    columns = panel // len(weights)
    shape, word = packed(n, k, dtype, panel, len(weights), words)
    result = np.empty(shape, word)
    steps = shape[1] - words.sums
    for index, weight in enumerate(weights):
        width = shape[2] // len(weights)
        part = result[:, :, index * width : (index + 1) * width]
        _place(part[:, :steps], _words(weight, words.elements, word), columns)
        if words.sums:
            sums = OFFSET * weight.reshape(n, words.sums, -1).sum(axis=2, dtype=np.int32)
            _place(result[:, steps:, index * columns : (index + 1) * columns], sums[..., None], columns)
    result[:, steps:, panel:] = 0
    return result


def _place(part: np.ndarray, rows: np.ndarray, columns: int) -> None:
    """Rows [n, steps, m] of words of m numbers each into panels [panels, steps, columns * m], padded with zeros."""
    n, steps, m = rows.shape
    full = n // columns
    panels = rows[: full * columns].reshape(full, columns, steps, m).transpose(0, 2, 1, 3)
    part[:full] = panels.reshape(full, steps, columns * m)
    if full < len(part):
        part[full] = 0
        last = rows[full * columns :].transpose(1, 0, 2)
        part[full, :, : last.shape[1] * m] = last.reshape(steps, -1)


def unpack(
    stored: np.ndarray, n: int, k: int, dtype: str, weights: int = 1, words: Words | None = None
) -> list[np.ndarray]:
    """The matrices [n, k] of this dtype that ``pack`` was given; bfloat16 as uint16 bit patterns."""
    words = words or Words(ELEMENTS[dtype])
    stored = stored[:, : stored.shape[1] - words.sums]
    panels, steps, width = stored.shape
    element, share = {"bfloat16": "uint16"}.get(dtype, dtype), width // weights
    m = words.elements // ELEMENTS[dtype]
    matrices = []
    for index in range(weights):
        part = stored[:, :, index * share : (index + 1) * share].reshape(panels, steps, share // m, m)
        rows = np.ascontiguousarray(part.transpose(0, 2, 1, 3)).reshape(panels * (share // m), -1)
        matrices.append(rows.view(element)[:n, :k].copy())
    return matrices


def _element(weight: np.ndarray) -> str:
    name = {"uint16": "bfloat16"}.get(str(weight.dtype), str(weight.dtype))
    if name not in ELEMENTS:
        raise ValueError(f"weights of dtype {weight.dtype} cannot be packed; known: {', '.join(ELEMENTS)}")
    return name


def _words(weight: np.ndarray, elements: int, word: str) -> np.ndarray:
    """The rows as words [n, ceil(k / elements), numbers of dtype ``word``], the last one padded with zeros."""
    missing = -weight.shape[1] % elements
    whole = np.pad(weight, ((0, 0), (0, missing))) if missing else np.ascontiguousarray(weight)
    return whole.view(word).reshape(len(weight), whole.shape[1] // elements, -1)
