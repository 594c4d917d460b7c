"""Element-wise kernels: broadcasting in every pattern, tails, dtypes, symbolic sizes, several outputs."""

from __future__ import annotations

import numpy as np
import pytest
from kernel_harness import run_kernel

from tersor.codegen.kernels.chain import Chain, ChainInput, Const, Step
from tersor.codegen.kernels.elementwise import Elementwise
from tersor.ir.dims import Dim

RNG = np.random.default_rng(0)
BATCH, LENGTH = Dim.symbol("batch"), Dim.symbol("length")


def array(shape, dtype="float32"):
    if dtype == "float32":
        return RNG.standard_normal(shape).astype(dtype)
    return RNG.integers(0, 2 if dtype == "bool" else 100, shape).astype(dtype)


def binary(op="add", dtype="float32"):
    return Chain((ChainInput("full", dtype), ChainInput("full", dtype)), (Step(op, (0, 1)),), (2,))


@pytest.mark.parametrize("size", [1, 2, 7, 8, 15, 16, 17, 31, 33, 100, 8191, 8192, 8193, 70001])
def test_flat_sizes(size, target):
    a, b = array(size), array(size)
    (got,) = run_kernel(Elementwise(binary(), ((size,), (size,)), (size,)), [a, b], target)
    np.testing.assert_array_equal(got, a + b)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ((2, 3, 5), (2, 3, 5)),
        ((2, 3, 5), (5,)),
        ((2, 3, 5), (3, 1)),
        ((2, 3, 5), ()),
        ((2, 1, 5), (3, 1)),
        ((4, 1, 1, 37), (1, 3, 11, 1)),
        ((2, 12, 9, 9), (2, 1, 1, 9)),
        ((2, 12, 9, 9), (1, 1, 9, 9)),
        ((40, 1000), (40, 1)),
        ((1, 1), (1,)),
        ((300, 7), (7,)),
        ((5, 1, 6, 1, 33), (5, 4, 1, 3, 1)),
    ],
)
def test_broadcasting(left, right, target):
    a, b = array(left), array(right)
    output = np.broadcast_shapes(left, right)
    (got,) = run_kernel(Elementwise(binary("mul"), (left, right), output), [a, b], target)
    np.testing.assert_array_equal(got, a * b)


def test_symbolic_sizes(target):
    mask = Elementwise(
        binary("sub"), ((BATCH, 12, LENGTH, LENGTH), (BATCH, 1, 1, LENGTH)), (BATCH, 12, LENGTH, LENGTH)
    )
    flat = Elementwise(binary(), ((BATCH, LENGTH, 24), (24,)), (BATCH, LENGTH, 24))
    for b, t in [(1, 1), (1, 2), (2, 7), (3, 16), (1, 33), (2, 65)]:
        scores, keys = array((b, 12, t, t)), array((b, 1, 1, t))
        np.testing.assert_array_equal(run_kernel(mask, [scores, keys], target)[0], scores - keys)
        x, bias = array((b, t, 24)), array(24)
        np.testing.assert_array_equal(run_kernel(flat, [x, bias], target)[0], x + bias)


def test_symbolic_flat_size(target):
    kernel = Elementwise(binary(), ((LENGTH,), (LENGTH,)), (LENGTH,))
    for size in (1, 5, 16, 100, 8192, 8200, 70001):
        a, b = array(size), array(size)
        np.testing.assert_array_equal(run_kernel(kernel, [a, b], target)[0], a + b)


@pytest.mark.parametrize("size", [3, 16, 45])
def test_bool_and_int64(size, target):
    """An additive mask from ids and a bool mask, and a comparison that leaves as bool."""
    chain = Chain(
        (ChainInput("full", "bool"), ChainInput("full", "int64")),
        (
            Step("lt", (1, Const(50))),
            Step("logical_and", (0, 2)),
            Step("where", (3, Const(0.0), Const(-1e9))),
            Step("add", (1, Const(7))),
        ),
        (3, 4, 5),
    )
    keep, ids = array((4, size), "bool"), array((4, size), "int64")
    both, additive, more = run_kernel(Elementwise(chain, ((4, size),) * 2, (4, size)), [keep, ids], target)
    expected = keep & (ids < 50)
    np.testing.assert_array_equal(both, expected)
    np.testing.assert_array_equal(additive, np.where(expected, np.float32(0), np.float32(-1e9)))
    np.testing.assert_array_equal(more, ids + 7)
    assert (both.dtype, additive.dtype, more.dtype) == (np.bool_, np.float32, np.int64)


def test_copy_and_fill(target):
    x = array((3, 21), "int64")
    copy = Elementwise(Chain((ChainInput("full", "int64"),), (), (0,)), ((3, 21),), (3, 21))
    np.testing.assert_array_equal(run_kernel(copy, [x], target)[0], x)
    ones = Chain((), (Step("add", (Const(0.5), Const(0.5))),), (0,))
    np.testing.assert_array_equal(run_kernel(Elementwise(ones, (), (3, 21)), [], target)[0], np.ones((3, 21)))


def test_shapes_that_do_not_broadcast():
    with pytest.raises(ValueError, match="does not broadcast"):
        Elementwise(binary(), ((3, 4), (2, 4)), (3, 4))
    with pytest.raises(ValueError, match="shapes for 2 inputs"):
        Elementwise(binary(), ((3, 4),), (3, 4))
