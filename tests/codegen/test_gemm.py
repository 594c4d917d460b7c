"""Packed GEMM against torch in f64: tails in every dimension, symbolic rows, epilogues, both instruction sets."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kernel_harness import run_kernel

from tersor.codegen.kernels.gemm import Gemm
from tersor.codegen.packing import pack
from tersor.codegen.tiles import panel_width
from tersor.ir.dims import Dim

RNG = np.random.default_rng(0)


def random(*shape):
    return RNG.standard_normal(shape, dtype=np.float32)


def product(a, w):
    return (torch.from_numpy(a).double() @ torch.from_numpy(w).double().T).float().numpy()


def check(target, a, w, lead=None):
    n, k = w.shape
    kernel = Gemm(lead or a.shape[:-1], k, n, panel=panel_width(target))
    (got,) = run_kernel(kernel, [a, pack([w], kernel.panel)], target)
    np.testing.assert_allclose(got, product(a, w), atol=2e-6 * k, rtol=1e-5)


@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 15, 16, 17, 127, 197])
@pytest.mark.parametrize("n", [1, 31, 32, 33, 100])
def test_static_rows_and_columns(m, n, target):
    check(target, random(m, 47), random(n, 47))


@pytest.mark.parametrize("k", [1, 2, 15, 16, 33, 384])
def test_inner_dimension(k, target):
    check(target, random(3, k), random(40, k))
    check(target, random(20, k), random(40, k))


@pytest.mark.parametrize("n", [384, 1000])
def test_wide(n, target):
    check(target, random(128, 64), random(n, 64))


def test_several_leading_dimensions(target):
    check(target, random(2, 3, 5, 24), random(40, 24))


@pytest.mark.parametrize("n", [32, 45])
def test_symbolic_rows(n, target):
    batch, length = Dim.symbol("batch"), Dim.symbol("length")
    w = random(n, 40)
    for b, t in [(1, t) for t in (*range(1, 20), 31, 127, 128, 129)] + [(2, 1), (3, 5), (8, 16), (5, 7)]:
        check(target, random(b, t, 40), w, (batch, length))


def test_symbolic_extent_that_is_not_a_name(target):
    length = Dim.symbol("length")
    kernel = Gemm((2, length + 1), 24, 40, panel=panel_width(target))
    a, w = random(2, 8, 24), random(40, 24)
    (got,) = run_kernel(kernel, [a, pack([w], kernel.panel)], target, [(2, 8, 40)])
    np.testing.assert_allclose(got, product(a, w), atol=1e-4)
