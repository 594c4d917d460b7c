"""Packed GEMM against torch in f64: tails in every dimension, symbolic rows, epilogues, both instruction sets."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import tvm
from kernel_harness import compile_kernel, run_kernel

from tersor.codegen.kernels.chain import PLAIN, Chain, ChainInput, Const, Step
from tersor.codegen.kernels.gemm import Gemm
from tersor.codegen.packing import pack
from tersor.codegen.tiles import choose, panel_width
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


@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 15, 16, 17, 127, 128, 197])
def test_rows(m, target):
    check(target, random(m, 47), random(33, 47))


@pytest.mark.parametrize("m", [5, 20])
@pytest.mark.parametrize("n", [1, 15, 16, 17, 31, 64, 100])
def test_columns(m, n, target):
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


@pytest.mark.parametrize("cores", [2, 8])
@pytest.mark.parametrize("m", [20, 128, 197])
def test_rows_split_between_threads(cores, m, target):
    """Three panels cannot be shared evenly by so many threads."""
    several = replace(target, cores=cores, sources={**target.sources, "cores": "assumed: for this test"})
    assert choose(several, panels=3).blocks > 1
    a, w = random(m, 40), random(3 * panel_width(target), 40)
    check(several, a, w)
    check(several, a, w, (Dim.symbol("rows"),))


def test_symbolic_extent_that_is_not_a_name(target):
    length = Dim.symbol("length")
    kernel = Gemm((2, length + 1), 24, 40, panel=panel_width(target))
    a, w = random(2, 8, 24), random(40, 24)
    (got,) = run_kernel(kernel, [a, pack([w], kernel.panel)], target, [(2, 8, 40)])
    np.testing.assert_allclose(got, product(a, w), atol=1e-4)


ACCUMULATOR, COLUMN, FULL = ChainInput("accumulator"), ChainInput("column"), ChainInput("full")
ROW, SCALAR = ChainInput("row"), ChainInput("scalar")


@pytest.mark.parametrize("m", [3, 30])
@pytest.mark.parametrize("n", [32, 50])
def test_epilogue_with_every_kind_of_input(m, n, target):
    """gelu(acc + column) * row + full * scalar, and its square as a second output."""
    steps = (
        Step("add", (0, 1)),
        Step("gelu_erf", (5,)),
        Step("mul", (6, 2)),
        Step("mul", (3, 4)),
        Step("add", (7, 8)),
        Step("mul", (9, 9)),
    )
    chain = Chain((ACCUMULATOR, COLUMN, ROW, FULL, SCALAR), steps, (9, 10))
    a, w, column, row, full = random(m, 20), random(n, 20), random(n), random(m, 1), random(m, n)
    scalar = np.array(0.5, np.float32)
    kernel = Gemm((m,), 20, n, chain, panel_width(target))
    assert [spec.shape for spec in kernel.inputs()[2:]] == [(n,), (m, 1), (m, n), ()]
    first, second = run_kernel(kernel, [a, pack([w], kernel.panel), column, row, full, scalar], target)
    gelu = torch.nn.functional.gelu(torch.from_numpy(product(a, w) + column).double()).numpy()
    expected = gelu * row + full * scalar
    np.testing.assert_allclose(first, expected, atol=1e-4, rtol=1e-5)
    np.testing.assert_allclose(second, expected**2, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("n", [48, 50])
@pytest.mark.parametrize("symbolic", [False, True])
def test_gated(n, symbolic, target):
    """silu(a @ gate.T) * (a @ up.T) + constant in one kernel."""
    steps = (Step("silu", (0,)), Step("mul", (2, 1)), Step("add", (3, Const(1.5))))
    chain = Chain((ACCUMULATOR, ACCUMULATOR), steps, (4,))
    a, gate, up = random(11, 30), random(n, 30), random(n, 30)
    kernel = Gemm((Dim.symbol("rows") if symbolic else 11,), 30, n, chain, panel_width(target), weights=2)
    (got,) = run_kernel(kernel, [a, pack([gate, up], kernel.panel)], target)
    expected = torch.nn.functional.silu(torch.from_numpy(product(a, gate))).numpy() * product(a, up) + 1.5
    np.testing.assert_allclose(got, expected, atol=1e-4)


@pytest.mark.parametrize("lead", [(5,), (13,), (Dim.symbol("rows"),)])
def test_nothing_is_written_beyond_the_output(lead, target):
    n, m = 33, 13 if isinstance(lead[0], Dim) else lead[0]
    kernel = Gemm(lead, 8, n, panel=panel_width(target))
    a, w = random(m, 8), random(n, 8)
    arena = tvm.runtime.tensor(np.full(m * n + 64, np.nan, np.float32))
    out = arena._create_view((m, n), "float32", 0)
    compile_kernel(kernel, target)["main"](
        tvm.runtime.tensor(a), tvm.runtime.tensor(pack([w], kernel.panel)), out
    )
    np.testing.assert_allclose(out.numpy(), product(a, w), atol=1e-4)
    assert np.isnan(arena.numpy()[m * n :]).all()


def test_threads_are_started_only_for_enough_work(target):
    def loops(lead, k, n):
        return Gemm(lead, k, n, panel=panel_width(target)).build(target).script().count("T.parallel")

    assert loops((4,), 64, 64) == 0
    assert loops((512,), 64, 64) == 1  # many rows
    assert loops((1,), 384, 384) == 1  # many weights
    assert loops((Dim.symbol("rows"),), 384, 384) == 1
    rows = Gemm((Dim.symbol("rows"),), 64, 64, panel=panel_width(target)).build(target).script()
    assert rows.count("T.parallel") == 1 and "if rows >=" in rows


def test_equal_descriptions_are_the_same_kernel():
    assert Gemm((3, 4), 8, 9) == Gemm((3, 4), 8, 9)
    assert len({Gemm((3, 4), 8, 9), Gemm((3, 4), 8, 9, PLAIN), Gemm((12,), 8, 9)}) == 2


def test_description_that_does_not_fit_together():
    two = Chain((ACCUMULATOR, ACCUMULATOR), (Step("mul", (0, 1)),), (2,))
    with pytest.raises(ValueError, match="accumulator"):
        Gemm((3,), 8, 9, two)
    with pytest.raises(ValueError, match="panel of 33"):
        Gemm((3,), 8, 9, two, panel=33, weights=2)
    with pytest.raises(ValueError, match="vectors"):
        from tersor.targets import resolve

        Gemm((3,), 8, 9, panel=4).build(resolve("x86-64-v3"))
