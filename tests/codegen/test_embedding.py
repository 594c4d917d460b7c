"""Embedding lookups: plain and packed tables, symbolic ids, ids out of range."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kernel_harness import run_kernel

from tersor.codegen.kernels.embedding import Decoding, Embedding
from tersor.codegen.packing import Words, pack
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


@pytest.mark.parametrize(
    "codes",
    [Decoding("int8"), Decoding("int8", per_row=False), Decoding("uint8", zero=117.0)],
    ids=["scale per row", "one scale", "zero point"],
)
@pytest.mark.parametrize("size", [5, 16, 50])
def test_rows_of_codes_are_decoded_bit_for_bit(codes, size, target):
    limits = np.iinfo(codes.dtype)
    table = RNG.integers(limits.min, limits.max + 1, (45, size)).astype(codes.dtype)
    table[44, :2] = limits.min, limits.max
    scales = np.abs(RNG.standard_normal((45, 1) if codes.per_row else (), dtype=np.float32)) + 0.01
    values = (table.astype(np.float32) - np.float32(codes.zero)) * scales
    kernel = Embedding((BATCH, LENGTH), 45, size, codes=codes)
    for b, t in [(1, 1), (2, 7), (3, 600)]:
        ids = RNG.integers(0, 45, (b, t))
        ids.flat[0] = 44
        (got,) = run_kernel(kernel, [ids, table, scales], target)
        np.testing.assert_array_equal(got, values[ids])


def test_codes_at_ids_out_of_range_give_nan_rows_and_read_nothing(target):
    table, scales = RNG.integers(-127, 128, (20, 8)).astype(np.int8), np.ones((20, 1), np.float32)
    ids = np.array([0, -1, 19, 20, 2**62, -(2**62), 3])
    kernel = Embedding((7,), 20, 8, codes=Decoding("int8"))
    (got,) = run_kernel(kernel, [ids, table, scales], target)
    valid = (ids >= 0) & (ids < 20)
    np.testing.assert_array_equal(got[valid], table[ids[valid]])
    assert np.isnan(got[~valid]).all()


@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
@pytest.mark.parametrize("size", [5, 16, 50])
def test_rows_of_16_bits_are_widened(stored, size, target):
    table = torch.from_numpy(RNG.standard_normal((45, size), dtype=np.float32)).to(getattr(torch, stored))
    values = table.float().numpy()
    kernel = Embedding((BATCH, LENGTH), 45, size, stored=stored)
    given = (table.view(torch.uint16) if stored == "bfloat16" else table).numpy()
    for b, t in [(1, 1), (3, 600)]:
        ids = RNG.integers(0, 45, (b, t))
        ids.flat[0] = 45
        (got,) = run_kernel(kernel, [ids, given], target)
        assert np.isnan(got[0, 0]).all()
        np.testing.assert_array_equal(got.reshape(-1, size)[1:], values[ids.ravel()[1:]])


@pytest.mark.parametrize("words", [None, Words(8), Words(4, signed=True, sums=1)])
@pytest.mark.parametrize("size", [3, 16, 50])
def test_rows_of_codes_that_are_packed_for_a_projection(size, words, target):
    table = RNG.integers(-128, 128, (45, size)).astype(np.int8)
    scales = np.abs(RNG.standard_normal((45, 1), dtype=np.float32)) + 0.01
    kernel = Embedding((BATCH, LENGTH), 45, size, 16, codes=Decoding("int8"), words=words)
    ids = np.array([[0, 44, 15], [16, 31, 45]])
    (got,) = run_kernel(kernel, [ids, pack([table], 16, words), scales], target)
    assert np.isnan(got[1, 2]).all()
    values = table.astype(np.float32) * scales
    np.testing.assert_array_equal(got.reshape(6, size)[:5], values[ids.ravel()[:5]])


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"codes": Decoding("int8"), "words": Words(4)}, "in words"),
        ({"panel": 16, "words": Words(4)}, "in words"),
        ({"panel": 16, "codes": Decoding("uint8"), "words": Words(4)}, "int8 codes"),
        ({"panel": 16, "stored": "float16"}, "16 bits"),
        ({"stored": "float16", "codes": Decoding("int8")}, "16 bits"),
    ],
)
def test_a_table_has_one_layout(form, message):
    with pytest.raises(ValueError, match=message):
        Embedding((1,), 20, 8, **form)
