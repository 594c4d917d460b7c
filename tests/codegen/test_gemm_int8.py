"""u8 x s8 GEMM against integer arithmetic: accumulators and requantized codes bit for bit, on every instruction set."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import tvm
from kernel_harness import compile_kernel, run_kernel

from tersor.codegen.kernels.chain import PLAIN, Chain, ChainInput, Const, Step
from tersor.codegen.kernels.gemm import Gemm
from tersor.codegen.kernels.inner_product import stored_words
from tersor.codegen.packing import pack
from tersor.codegen.tiles import panel_width
from tersor.ir.dims import Dim

RNG = np.random.default_rng(0)
ACCUMULATOR, START = ChainInput("accumulator", "int32"), ChainInput("column", "int32")
COLUMN, ROW, FULL = ChainInput("column"), ChainInput("row"), ChainInput("full")
SUMS = Chain((ACCUMULATOR,), (), (0,))
ZERO_POINT = 11


def codes(*shape):
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def weights(*shape):
    return RNG.integers(-128, 128, shape, dtype=np.int8)


def exact(a, w):
    """The int32 accumulators."""
    product = torch.from_numpy(a).to(torch.int64) @ torch.from_numpy(w).to(torch.int64).T
    return product.to(torch.int32).numpy()


def requantized(x, zero_point=ZERO_POINT):
    """The codes of an f32 array that is scaled already."""
    return np.clip(np.rint(x) + np.float32(zero_point), 0, 255).astype(np.uint8)


def requantize(value, following):
    """Chain steps from an f32 value to codes; ``following`` is the number of the first of them."""
    return (
        Step("round", (value,)),
        Step("add", (following, Const(float(ZERO_POINT)))),
        Step("saturate", (following + 1,), "uint8"),
    )


def check(target, a, w, lead=None):
    n, k = w.shape
    kernel = Gemm(lead or a.shape[:-1], k, n, SUMS, panel_width(target), dtype="uint8")
    (got,) = run_kernel(kernel, [a, pack([w], kernel.panel)], target)
    np.testing.assert_array_equal(got, exact(a, w))


@pytest.mark.parametrize("m", [1, 4, 5, 9, 128])
def test_rows(m, integer_target):
    check(integer_target, codes(m, 52), weights(33, 52))


@pytest.mark.parametrize("m", [2, 20])
@pytest.mark.parametrize("n", [1, 16, 31, 100])
def test_columns(m, n, integer_target):
    check(integer_target, codes(m, 52), weights(n, 52))


@pytest.mark.parametrize("k", [1, 2, 3, 4, 66, 131])
def test_inner_dimension(k, integer_target):
    check(integer_target, codes(3, k), weights(40, k))
    check(integer_target, codes(20, k), weights(40, k))


@pytest.mark.parametrize("code", [0, 1, 255])
@pytest.mark.parametrize("weight", [-128, 127])
def test_extreme_codes(code, weight, integer_target):
    """Pairs of these do not fit 16 bits, as which vpmaddubsw would add them."""
    check(integer_target, np.full((9, 1030), code, np.uint8), np.full((32, 1030), weight, np.int8))


def test_extreme_codes_mixed(integer_target):
    check(
        integer_target, RNG.choice(np.uint8([0, 255]), (9, 200)), RNG.choice(np.int8([-128, 127]), (40, 200))
    )


@pytest.mark.parametrize("k", [40, 43])
def test_symbolic_rows(k, integer_target):
    batch, length = Dim.symbol("batch"), Dim.symbol("length")
    w = weights(45, k)
    for b, t in [(1, t) for t in (*range(1, 14), 31, 127)] + [(3, 5), (5, 7)]:
        check(integer_target, codes(b, t, k), w, (batch, length))


@pytest.mark.parametrize("lead", [(5,), (13,), (Dim.symbol("rows"),)])
def test_nothing_is_written_beyond_the_output(lead, integer_target):
    m, n, k = 13 if isinstance(lead[0], Dim) else lead[0], 33, 9
    chain = Chain((ACCUMULATOR, COLUMN), (Step("mul", (0, 1)), *requantize(2, 3)), (5,))
    kernel = Gemm(lead, k, n, chain, panel_width(integer_target), dtype="uint8")
    a, w, scale = codes(m, k), weights(n, k), np.full(n, 0.01, np.float32)
    arena = tvm.runtime.tensor(np.full(m * n + 64, 77, np.uint8))
    out = arena._create_view((m, n), "uint8", 0)
    arguments = [tvm.runtime.tensor(x) for x in (a, pack([w], kernel.panel), scale)]
    compile_kernel(kernel, integer_target)["main"](*arguments, out)
    np.testing.assert_array_equal(out.numpy(), requantized(exact(a, w).astype(np.float32) * scale))
    assert (arena.numpy()[m * n :] == 77).all()


@pytest.mark.parametrize("m", [3, 30])
@pytest.mark.parametrize("n", [32, 50])
def test_static_requantization(m, n, integer_target):
    """An int32 bias, one multiplier a column, u8 codes; f32 as a second output."""
    steps = (Step("add", (0, 1)), Step("mul", (3, 2)), *requantize(4, 5))
    chain = Chain((ACCUMULATOR, START, COLUMN), steps, (7, 4))
    kernel = Gemm((m,), 70, n, chain, panel_width(integer_target), dtype="uint8")
    assert [spec.dtype for spec in kernel.outputs()] == ["uint8", "float32"]
    a, w = codes(m, 70), weights(n, 70)
    bias = RNG.integers(-(2**20), 2**20, n, dtype=np.int32)
    scale = RNG.uniform(1e-4, 2e-3, n).astype(np.float32)
    got, wide = run_kernel(kernel, [a, pack([w], kernel.panel), bias, scale], integer_target)
    expected = (exact(a, w) + bias).astype(np.float32) * scale
    np.testing.assert_array_equal(wide, expected)
    np.testing.assert_array_equal(got, requantized(expected))
    assert {0, 255} < set(got.flat)  # saturated, and not everywhere


def test_ties_are_rounded_to_even(integer_target):
    """Sums of n times the multiplier 1/2, for every n from -600 to 600."""
    a = np.ones((1, 8), np.uint8)
    targets = np.arange(-600, 601)
    w = np.stack([(targets + i) // 8 for i in range(8)], 1).astype(np.int8)
    np.testing.assert_array_equal(exact(a, w)[0], targets)
    chain = Chain((ACCUMULATOR,), (Step("mul", (0, Const(0.5))), *requantize(1, 2)), (4,))
    kernel = Gemm((1,), 8, len(w), chain, panel_width(integer_target), dtype="uint8")
    (got,) = run_kernel(kernel, [a, pack([w], kernel.panel)], integer_target)
    halves = torch.from_numpy(targets).float() / 2
    expected = (halves.round() + ZERO_POINT).clamp(0, 255).to(torch.uint8)
    np.testing.assert_array_equal(got[0], expected.numpy())


@pytest.mark.parametrize("zero_point", [0.0, 11.0, 255.0])
def test_values_far_outside_the_codes(zero_point, integer_target):
    """Beyond int32, infinite, or not numbers: the nearest code, or the lowest."""
    scale = np.float32([0.5, -0.5, 3e9, -3e9, 1e30, -1e30, np.inf, -np.inf, np.nan, *np.linspace(-3, 3, 55)])
    chain = Chain(
        (ACCUMULATOR, COLUMN, ChainInput("scalar")),
        (
            Step("mul", (0, 1)),
            Step("round", (3,)),
            Step("add", (4, 2)),
            Step("saturate", (5,), "uint8"),
        ),
        (6,),
    )
    kernel = Gemm((9,), 8, len(scale), chain, panel_width(integer_target), dtype="uint8")
    a, w = codes(9, 8), np.ones((len(scale), 8), np.int8)
    given = [a, pack([w], kernel.panel), scale, np.float32(zero_point)]
    (got,) = run_kernel(kernel, given, integer_target)
    wide = torch.from_numpy(exact(a, w).astype(np.float32)) * torch.from_numpy(scale)
    expected = (wide.round() + zero_point).clamp(0, 255).nan_to_num(0.0).to(torch.uint8)
    np.testing.assert_array_equal(got, expected.numpy())


@pytest.mark.parametrize("m", [1, 21])
def test_two_sums_start_from_columns_of_their_own(m, integer_target):
    """What is added to them otherwise is not where they start; sums wrap round alike."""
    steps = (
        Step("add", (0, 3)),
        Step("add", (1, 2)),
        Step("add", (4, 2)),
        Step("cast", (5,), "float32"),
        Step("cast", (6,), "float32"),
    )
    chain = Chain((ACCUMULATOR, ACCUMULATOR, START, START), steps, (7, 8))
    kernel = Gemm((m,), 30, 64, chain, panel_width(integer_target), weights=2, dtype="uint8")
    a, first, second = codes(m, 30), weights(64, 30), weights(64, 30)
    columns = [RNG.integers(-(2**31), 2**31, 64, dtype=np.int32) for _ in range(2)]
    got = run_kernel(kernel, [a, pack([first, second], kernel.panel), *columns], integer_target)
    left, right = exact(a, first) + columns[1], exact(a, second) + columns[0]
    np.testing.assert_array_equal(got[0], right.astype(np.float32))
    np.testing.assert_array_equal(got[1], (left + columns[0]).astype(np.float32))


@pytest.mark.parametrize("symbolic", [False, True])
def test_dynamic_scales(symbolic, integer_target):
    """A scale per row times a scale per column, then an f32 residual."""
    steps = (
        Step("add", (0, 1)),
        Step("mul", (5, 2)),
        Step("mul", (6, 3)),
        Step("add", (7, 4)),
    )
    chain = Chain((ACCUMULATOR, START, COLUMN, ROW, FULL), steps, (8,))
    kernel = Gemm(
        (Dim.symbol("m") if symbolic else 21,), 65, 48, chain, panel_width(integer_target), dtype="uint8"
    )
    a, w, start = codes(21, 65), weights(48, 65), RNG.integers(-(2**16), 2**16, 48, dtype=np.int32)
    column, row = RNG.random(48, np.float32), RNG.random((21, 1), np.float32)
    residual = RNG.standard_normal((21, 48), np.float32)
    (got,) = run_kernel(kernel, [a, pack([w], kernel.panel), start, column, row, residual], integer_target)
    expected = (exact(a, w) + start).astype(np.float64) * column * row + residual
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-3)


def test_zero_points_are_taken_off_the_sums(integer_target):
    """Of the activations, for every row, and of the weights, for every column: in int32, bit for bit."""
    row, n, k = ChainInput("row", "int32"), 48, 65
    steps = (Step("mul", (1, 2)), Step("sub", (0, 5)), Step("mul", (3, 4)), Step("sub", (6, 7)))
    chain = Chain((ACCUMULATOR, row, START, row, START), (*steps, Step("cast", (8,), "float32")), (9,))
    kernel = Gemm((21,), k, n, chain, panel_width(integer_target), dtype="uint8")
    a, w = codes(21, k), weights(n, k)
    zero, point = codes(21, 1).astype(np.int32), weights(n).astype(np.int32)
    weight_sums, code_sums = w.astype(np.int32).sum(1) - k * point, a.astype(np.int32).sum(1, keepdims=True)
    given = [
        a,
        pack([w], kernel.panel),
        zero,
        weight_sums.astype(np.int32),
        code_sums.astype(np.int32),
        point,
    ]
    (got,) = run_kernel(kernel, given, integer_target)
    np.testing.assert_array_equal(got, (a.astype(np.int64) - zero) @ (w.astype(np.int64) - point[:, None]).T)


def test_residual_in_codes(integer_target):
    """Both operands of the residual sum are dequantized, their sum is requantized."""
    residual = ChainInput("full", "uint8")
    steps = (
        Step("mul", (0, 1)),
        Step("cast", (2,), "float32"),
        Step("sub", (4, Const(128.0))),
        Step("mul", (5, Const(0.25))),
        Step("add", (3, 6)),
        *requantize(7, 8),
    )
    chain = Chain((ACCUMULATOR, COLUMN, residual), steps, (10,))
    kernel = Gemm((19,), 32, 40, chain, panel_width(integer_target), dtype="uint8")
    a, w, extra = codes(19, 32), weights(40, 32), codes(19, 40)
    scale = np.full(40, 2**-10, np.float32)  # so that no product is rounded
    (got,) = run_kernel(kernel, [a, pack([w], kernel.panel), scale, extra], integer_target)
    wide = exact(a, w).astype(np.float32) * scale + (extra.astype(np.float32) - 128) * np.float32(0.25)
    np.testing.assert_array_equal(got, requantized(wide))


def test_gated(integer_target):
    """silu(a @ gate.T) * (a @ up.T) from two integer accumulators."""
    steps = (Step("mul", (0, 2)), Step("mul", (1, 3)), Step("silu", (4,)), Step("mul", (6, 5)))
    chain = Chain((ACCUMULATOR, ACCUMULATOR, COLUMN, COLUMN), steps, (7,))
    kernel = Gemm((11,), 30, 48, chain, panel_width(integer_target), weights=2, dtype="uint8")
    a, gate, up = codes(11, 30), weights(48, 30), weights(48, 30)
    scales = [RNG.uniform(1e-5, 1e-4, 48).astype(np.float32) for _ in range(2)]
    (got,) = run_kernel(kernel, [a, pack([gate, up], kernel.panel), *scales], integer_target)
    left, right = (
        torch.from_numpy(exact(a, w).astype(np.float32) * s) for w, s in zip((gate, up), scales, strict=True)
    )
    np.testing.assert_allclose(got, (torch.nn.functional.silu(left) * right).numpy(), rtol=1e-5, atol=1e-6)


def test_description_that_does_not_fit_together():
    with pytest.raises(ValueError, match="accumulators of a uint8 GEMM are int32"):
        Gemm((3,), 8, 9, dtype="uint8")
    with pytest.raises(ValueError, match="saturate"):
        Step("saturate", (0,), "int32")


def grouped(a, w, scales):
    """The f32 sums of codes less 128, each group's times its scale, and how far rounding may take them."""
    groups = scales.shape[-1]
    parts = np.einsum(
        "mgk,ngk->mgn",
        a.astype(np.float64).reshape(len(a), groups, -1) - 128,
        w.astype(np.float64).reshape(len(w), groups, -1),
    )
    scaled = parts * scales[..., None]
    return scaled.sum(1), 1e-6 * np.abs(scaled).sum(1)


def check_groups(target, m, k, n, groups, symbolic=False):
    """Scales of very different size: only exact sums within the groups come out right."""
    a, w = codes(m, k), weights(n, k)
    scales = (10.0 ** RNG.uniform(-3, 1, (m, groups))).astype(np.float32)
    words = stored_words("uint8", target, groups)
    lead = (Dim.symbol("m") if symbolic else m,)
    kernel = Gemm(lead, k, n, PLAIN, panel_width(target), dtype="uint8", words=words, groups=groups)
    (got,) = run_kernel(kernel, [a, pack([w], kernel.panel, words), scales], target)
    expected, tolerance = grouped(a, w, scales)
    assert (np.abs(got - expected) <= tolerance + 1e-5).all()


@pytest.mark.parametrize("m", [1, 2, 5, 9, 30])
@pytest.mark.parametrize(("k", "groups"), [(96, 1), (96, 2), (192, 2), (576, 6)])
def test_a_scale_for_every_group(m, k, groups, integer_target):
    check_groups(integer_target, m, k, 40, groups)


def test_groups_of_symbolic_rows(integer_target):
    for m in (1, 3, 7, 8, 12, 13, 40):
        check_groups(integer_target, m, 160, 33, 5, symbolic=True)


def test_groups_of_extreme_codes(integer_target):
    target, groups = integer_target, 2
    words = stored_words("uint8", target, groups)
    kernel = Gemm((3,), 64, 32, PLAIN, panel_width(target), dtype="uint8", words=words, groups=groups)
    scales = np.array([[1, 2]] * 3, np.float32)
    for code, weight in [(0, -128), (255, -128), (0, 127), (255, 127), (128, -128)]:
        a, w = np.full((3, 64), code, np.uint8), np.full((32, 64), weight, np.int8)
        (got,) = run_kernel(kernel, [a, pack([w], kernel.panel, words), scales], target)
        np.testing.assert_array_equal(got, np.full((3, 32), 3 * 32 * (code - 128) * weight, np.float32))


def test_gated_groups_with_a_bias(integer_target):
    """Two layers of one input, their scales and bias behind the sums."""
    target, (m, k, n, groups) = integer_target, (10, 128, 48, 4)
    inputs = (ChainInput("accumulator"),) * 2 + (COLUMN, COLUMN)
    chain = Chain(inputs, (Step("mul", (0, 2)), Step("mul", (1, 3)), Step("mul", (4, 5))), (6,))
    words = stored_words("uint8", target, groups)
    kernel = Gemm(
        (m,), k, n, chain, panel_width(target), weights=2, dtype="uint8", words=words, groups=groups
    )
    a, first, second = codes(m, k), weights(n, k), weights(n, k)
    scales = RNG.uniform(1e-3, 1e-2, (m, groups)).astype(np.float32)
    columns = [RNG.random(n, np.float32) for _ in range(2)]
    packed = pack([first, second], kernel.panel, words)
    (got,) = run_kernel(kernel, [a, packed, scales, *columns], target)
    left, right = (grouped(a, w, scales)[0] * c for w, c in zip((first, second), columns, strict=True))
    np.testing.assert_allclose(got, left * right, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("k", "dtype"), [(100, "uint8"), (64, "float32")])
def test_groups_that_are_none(k, dtype):
    with pytest.raises(ValueError, match="groups of codes"):
        Gemm((3,), k, 32, PLAIN, dtype=dtype, groups=2)
