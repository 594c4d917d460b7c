"""Packed layouts: where elements lie, zero padding, and the way back."""

from __future__ import annotations

import numpy as np
import pytest

from tersor.codegen.packing import Words, pack, packed, unpack


def matrix(n, k, start=1):
    return np.arange(start, start + n * k, dtype=np.float32).reshape(n, k)


def test_layout():
    packed = pack([matrix(5, 3)], 4)
    assert packed.shape == (2, 3, 4)
    np.testing.assert_array_equal(packed[0], matrix(5, 3)[:4].T)
    np.testing.assert_array_equal(packed[1, :, 0], matrix(5, 3)[4])
    assert not packed[1, :, 1:].any()


def test_two_matrices_share_each_panel():
    gate, up = matrix(3, 2), matrix(3, 2, 100)
    packed = pack([gate, up], 4)
    np.testing.assert_array_equal(packed[0], np.concatenate([gate[:2], up[:2]]).T)
    np.testing.assert_array_equal(packed[1], np.stack([gate[2], [0, 0], up[2], [0, 0]]).T)


def test_words_of_several_elements():
    """Four bytes of one column in a word, the first in its lowest bits; an incomplete word ends with zeros."""
    weight = np.array([[1, 2, 3, 4, -1, -128], [5, 6, 7, 8, 127, 0]], np.int8)
    result = pack([weight], 4)
    assert result.shape == (1, 2, 4) and result.dtype == np.int32
    np.testing.assert_array_equal(np.array(result[0, :, 0]).view(np.int8), [1, 2, 3, 4, -1, -128, 0, 0])
    np.testing.assert_array_equal(np.array(result[0, :, 1]).view(np.int8), [5, 6, 7, 8, 127, 0, 0, 0])
    halves = pack([np.array([[1, 2, 3]], np.uint16)], 2)
    np.testing.assert_array_equal(halves, [[[0x20001, 0], [3, 0]]])


@pytest.mark.parametrize("n", [1, 16, 31, 32, 33, 100])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_unpack_is_the_inverse(n, count, dtype):
    bits = {"bfloat16": np.uint16}.get(dtype, dtype)
    weights = [(matrix(n, 7, 1000 * i) % 127).astype(bits) for i in range(count)]
    result = pack(weights, 32)
    assert (result.shape, str(result.dtype)) == packed(n, 7, dtype, 32, count)
    assert result.flags.c_contiguous
    for back, weight in zip(unpack(result, n, 7, dtype, count), weights, strict=True):
        assert back.dtype == bits
        np.testing.assert_array_equal(back, weight)


def test_matrices_that_do_not_fit_together():
    with pytest.raises(ValueError, match=r"float32 \(3, 2\), float32 \(4, 2\)"):
        pack([matrix(3, 2), matrix(4, 2)], 32)
    with pytest.raises(ValueError, match="int8"):
        pack([matrix(3, 2), matrix(3, 2).astype(np.int8)], 32)
    with pytest.raises(ValueError, match="33"):
        pack([matrix(3, 2), matrix(3, 2)], 33)
    with pytest.raises(ValueError, match="int64"):
        pack([matrix(3, 2).astype(np.int64)], 32)


@pytest.mark.parametrize(
    "words", [Words(8), Words(4, True, 1), Words(16, True, 1), Words(4, sums=2), Words(4, True)], ids=str
)
@pytest.mark.parametrize("count", [1, 2])
def test_wide_words_and_sums(words, count):
    generator = np.random.default_rng(1)
    k = 32 if words.sums > 1 else 19
    weights = [generator.integers(-128, 128, (21, k), dtype=np.int8) for _ in range(count)]
    result = pack(weights, 8, words)
    assert (result.shape, str(result.dtype)) == packed(21, k, "int8", 8, count, words)
    for back, weight in zip(unpack(result, 21, k, "int8", count, words), weights, strict=True):
        np.testing.assert_array_equal(back, weight)
    # one panel, its first word: the first elements of each column side by side
    first = result[0, 0].view(np.int8)[: words.elements]
    np.testing.assert_array_equal(first, np.pad(weights[0][0], (0, 32))[: words.elements])
    if words.sums:
        columns = 8 // count
        parts = weights[0][columns : 2 * columns].reshape(columns, words.sums, -1)
        np.testing.assert_array_equal(result[1, -words.sums :, :columns], 128 * parts.sum(2).T)
        assert not result[:, -words.sums :, 8:].any()
