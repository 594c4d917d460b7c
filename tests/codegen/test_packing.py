"""Packed layouts: where elements lie, zero padding, and the way back."""

from __future__ import annotations

import numpy as np
import pytest

from tersor.codegen.packing import pack, packed_shape, unpack


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


@pytest.mark.parametrize("n", [1, 16, 31, 32, 33, 100])
@pytest.mark.parametrize("count", [1, 2])
def test_unpack_is_the_inverse(n, count):
    weights = [matrix(n, 7, 1000 * i) for i in range(count)]
    packed = pack(weights, 32)
    assert packed.shape == packed_shape(n, 7, 32, count) and packed.flags.c_contiguous
    for back, weight in zip(unpack(packed, n, count), weights, strict=True):
        np.testing.assert_array_equal(back, weight)


def test_matrices_that_do_not_fit_together():
    with pytest.raises(ValueError, match="shapes"):
        pack([matrix(3, 2), matrix(4, 2)], 32)
    with pytest.raises(ValueError, match="33"):
        pack([matrix(3, 2), matrix(3, 2)], 33)
