"""GEMM by fp16 weights that are widened as they are read, against torch in f64; fp16 results. ARM: test_arm.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kernel_harness import run_kernel

from tersor.codegen.kernels.chain import PLAIN, Chain, ChainInput, Step
from tersor.codegen.kernels.gemm import Gemm
from tersor.codegen.packing import pack
from tersor.codegen.tiles import panel_width
from tersor.ir.dims import Dim

RNG = np.random.default_rng(0)
ACCUMULATOR, COLUMN = ChainInput("accumulator"), ChainInput("column")


def random(*shape, dtype=np.float32):
    return RNG.standard_normal(shape).astype(dtype)


def product(a, w):
    return a.astype(np.float64) @ w.astype(np.float64).T


def check(target, m, n, k, lead=None):
    a, w = random(*m, k), random(n, k, dtype=np.float16)
    kernel = Gemm(lead or m, k, n, PLAIN, panel_width(target), stored="float16")
    assert kernel.inputs()[1].dtype == "float16"
    (got,) = run_kernel(kernel, [a, pack([w], kernel.panel)], target)
    np.testing.assert_allclose(got, product(a, w), atol=2e-6 * k, rtol=1e-5)


@pytest.mark.parametrize("m", [1, 5, 128])
@pytest.mark.parametrize(("n", "k"), [(1, 46), (33, 1), (100, 47), (64, 384)])
def test_shapes(m, n, k, target):
    check(target, (m,), n, k)


def test_symbolic_rows(target):
    lead = Dim.symbol("batch"), Dim.symbol("length")
    for b, t in [(1, t) for t in (*range(1, 14), 31, 127)] + [(3, 5), (5, 7)]:
        check(target, (b, t), 45, 41, lead)


def test_all_finite_weights_and_infinity(target):
    """Every bit pattern of fp16 is widened to its value, the smallest included."""
    bits = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    weights = bits[~np.isnan(bits)].reshape(-1, 1)
    kernel = Gemm((1,), 1, len(weights), PLAIN, panel_width(target), stored="float16")
    (got,) = run_kernel(kernel, [np.ones((1, 1), np.float32), pack([weights], kernel.panel)], target)
    np.testing.assert_array_equal(got[0], weights[:, 0].astype(np.float32))


@pytest.mark.parametrize(("m", "n"), [(3, 33), (30, 64)])
def test_epilogue_in_fp16(m, n, target):
    """gelu(sum + bias) + an fp16 residual, in f32 and rounded to fp16."""
    steps = (Step("add", (0, 1)), Step("gelu_erf", (3,)), Step("add", (4, 2)), Step("cast", (5,), "float16"))
    chain = Chain((ACCUMULATOR, COLUMN, ChainInput("full", "float16")), steps, (6, 5))
    kernel = Gemm((m,), 50, n, chain, panel_width(target), stored="float16")
    assert [spec.dtype for spec in kernel.outputs()] == ["float16", "float32"]
    a, w, bias = random(m, 50), random(n, 50, dtype=np.float16), random(n)
    residual = random(m, n, dtype=np.float16)
    got, wide = run_kernel(kernel, [a, pack([w], kernel.panel), bias, residual], target)
    gelu = torch.nn.functional.gelu(torch.from_numpy(product(a, w) + bias)).numpy()
    np.testing.assert_allclose(wide, gelu + residual.astype(np.float64), atol=1e-4)
    np.testing.assert_array_equal(got, wide.astype(np.float16))


def test_gated(target):
    """silu(a @ gate.T) * (a @ up.T) in one kernel."""
    chain = Chain((ACCUMULATOR, ACCUMULATOR), (Step("silu", (0,)), Step("mul", (2, 1))), (3,))
    a, gate, up = random(11, 30), random(50, 30, dtype=np.float16), random(50, 30, dtype=np.float16)
    kernel = Gemm((11,), 30, 50, chain, panel_width(target), weights=2, stored="float16")
    (got,) = run_kernel(kernel, [a, pack([gate, up], kernel.panel)], target)
    expected = torch.nn.functional.silu(torch.from_numpy(product(a, gate))).numpy() * product(a, up)
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_what_no_kernel_multiplies(target):
    with pytest.raises(ValueError, match="float32 is"):
        Gemm((1,), 8, 8, dtype="bfloat16", stored="float16")
    with pytest.raises(ValueError, match="multiply float32 by float16 instead"):
        Gemm((1,), 8, 32, panel=panel_width(target), dtype="float16").build(target)
