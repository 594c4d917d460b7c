"""Embedding lookups: plain and packed tables, symbolic ids, ids out of range."""

from __future__ import annotations

import numpy as np
import pytest
from kernel_harness import run_kernel

from tersor.codegen.kernels.embedding import Embedding
from tersor.codegen.packing import pack
from tersor.ir.dims import Dim

RNG = np.random.default_rng(0)
BATCH, LENGTH = Dim.symbol("batch"), Dim.symbol("length")


@pytest.mark.parametrize("panel", [0, 16, 32])
@pytest.mark.parametrize("size", [5, 16, 50])
def test_rows(panel, size, target):
    table = RNG.standard_normal((45, size), dtype=np.float32)
    kernel = Embedding((BATCH, LENGTH), 45, size, panel)
    for b, t in [(1, 1), (2, 7), (3, 600)]:
        ids = RNG.integers(0, 45, (b, t))
        ids.flat[0] = 44
        (got,) = run_kernel(kernel, [ids, pack([table], panel) if panel else table], target)
        np.testing.assert_array_equal(got, table[ids])


@pytest.mark.parametrize("panel", [0, 16])
def test_ids_out_of_range_give_nan_rows_and_read_nothing(panel, target):
    table = RNG.standard_normal((20, 8), dtype=np.float32)
    ids = np.array([0, -1, 19, 20, 2**62, -(2**62), 3])
    (got,) = run_kernel(
        Embedding((7,), 20, 8, panel), [ids, pack([table], panel) if panel else table], target
    )
    valid = (ids >= 0) & (ids < 20)
    np.testing.assert_array_equal(got[valid], table[ids[valid]])
    assert np.isnan(got[~valid]).all()
