"""bf16 GEMM against torch in f64: tails, epilogues, bf16 results, on every instruction set with a way of its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import tvm
from kernel_harness import run_kernel

from tersor.codegen.kernels.chain import PLAIN, Chain, ChainInput, Step
from tersor.codegen.kernels.gemm import Gemm
from tersor.codegen.llvm import llvm_target
from tersor.codegen.packing import pack
from tersor.codegen.tiles import panel_width
from tersor.ir.dims import Dim

RNG = np.random.default_rng(0)
ACCUMULATOR, COLUMN = ChainInput("accumulator"), ChainInput("column")


def random(*shape):
    """Numbers that bf16 can hold."""
    return RNG.standard_normal(shape, dtype=np.float32).astype("bfloat16")


def product(a, w):
    a, w = (torch.from_numpy(x.astype(np.float64)) for x in (a, w))
    return (a @ w.T).numpy()


def check(target, a, w, lead=None):
    n, k = w.shape
    kernel = Gemm(lead or a.shape[:-1], k, n, PLAIN, panel_width(target), dtype="bfloat16")
    (got,) = run_kernel(kernel, [a, pack([w], kernel.panel)], target)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, product(a, w), atol=2e-6 * k, rtol=1e-5)


@pytest.mark.parametrize("m", [1, 4, 5, 9, 128])
def test_rows(m, bf16_target):
    check(bf16_target, random(m, 46), random(33, 46))


@pytest.mark.parametrize("m", [2, 20])
@pytest.mark.parametrize("n", [1, 16, 31, 100])
def test_columns(m, n, bf16_target):
    check(bf16_target, random(m, 46), random(n, 46))


@pytest.mark.parametrize("k", [1, 2, 3, 33, 384])
def test_inner_dimension(k, bf16_target):
    check(bf16_target, random(3, k), random(40, k))
    check(bf16_target, random(20, k), random(40, k))


@pytest.mark.parametrize("k", [40, 41])
def test_symbolic_rows(k, bf16_target):
    batch, length = Dim.symbol("batch"), Dim.symbol("length")
    w = random(45, k)
    for b, t in [(1, t) for t in (*range(1, 14), 31, 127)] + [(3, 5), (5, 7)]:
        check(bf16_target, random(b, t, k), w, (batch, length))


def test_odd_rows_do_not_read_their_neighbours(bf16_target):
    """The last word of a row is half a word: the other half, infinite here, is the next row's."""
    a, w = random(9, 7), random(32, 7)
    a[1::2, 0] = np.inf
    kernel = Gemm((9,), 7, 32, PLAIN, panel_width(bf16_target), dtype="bfloat16")
    (got,) = run_kernel(kernel, [a, pack([w], kernel.panel)], bf16_target)
    np.testing.assert_allclose(got[::2], product(a[::2], w), atol=1e-5)
    assert not np.isfinite(got[1::2]).any()


@pytest.mark.parametrize("m", [3, 30])
@pytest.mark.parametrize("n", [33, 64])
def test_epilogue_in_bf16(m, n, bf16_target):
    """gelu(sum + bias) + a bf16 residual, in f32 and rounded to bf16."""
    steps = (
        Step("add", (0, 1)),
        Step("gelu_erf", (3,)),
        Step("add", (4, 2)),
        Step("cast", (5,), "bfloat16"),
    )
    chain = Chain((ACCUMULATOR, COLUMN, ChainInput("full", "bfloat16")), steps, (6, 5))
    kernel = Gemm((m,), 50, n, chain, panel_width(bf16_target), dtype="bfloat16")
    assert [spec.dtype for spec in kernel.outputs()] == ["bfloat16", "float32"]
    a, w, residual, bias = random(m, 50), random(n, 50), random(m, n), RNG.standard_normal(n, np.float32)
    got, wide = run_kernel(kernel, [a, pack([w], kernel.panel), bias, residual], bf16_target)
    gelu = torch.nn.functional.gelu(torch.from_numpy(product(a, w) + bias)).numpy()
    np.testing.assert_allclose(wide, gelu + residual.astype(np.float64), atol=1e-4)
    rounded = torch.from_numpy(wide).bfloat16().float().numpy()
    np.testing.assert_array_equal(got.astype(np.float32), rounded)


def test_gated(bf16_target):
    """silu(a @ gate.T) * (a @ up.T) in one kernel."""
    chain = Chain((ACCUMULATOR, ACCUMULATOR), (Step("silu", (0,)), Step("mul", (2, 1))), (3,))
    a, gate, up = random(11, 30), random(50, 30), random(50, 30)
    kernel = Gemm((11,), 30, 50, chain, panel_width(bf16_target), weights=2, dtype="bfloat16")
    (got,) = run_kernel(kernel, [a, pack([gate, up], kernel.panel)], bf16_target)
    expected = torch.nn.functional.silu(torch.from_numpy(product(a, gate))).numpy() * product(a, up)
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_bit_patterns_pack_like_numbers():
    w = random(5, 7)
    np.testing.assert_array_equal(pack([w], 32), pack([w.view(np.uint16)], 32))


def test_several_kernels_in_one_module(bf16_target):
    """Each brings the same helper functions along."""
    kernels = {
        f"gemm_{n}": Gemm((9,), 30, n, panel=panel_width(bf16_target), dtype="bfloat16") for n in (32, 64)
    }
    module = tvm.IRModule(
        {name: kernel.build(bf16_target).with_attr("global_symbol", name) for name, kernel in kernels.items()}
    )
    compiled = tvm.compile(module, target=llvm_target(bf16_target))
    for name, kernel in kernels.items():
        a, w = random(9, 30), random(kernel.n, 30)
        out = tvm.runtime.empty((9, kernel.n), "float32")
        compiled[name](tvm.runtime.tensor(a), tvm.runtime.tensor(pack([w], kernel.panel)), out)
        np.testing.assert_allclose(out.numpy(), product(a, w), atol=1e-4)
