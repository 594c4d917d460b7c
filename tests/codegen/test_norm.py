"""Norms and reductions against torch in f64: tails, residual chains, large means, symbolic rows, any dimensions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kernel_harness import run_kernel

from tersor.codegen.kernels.chain import Chain, ChainInput, Step
from tersor.codegen.kernels.norm import LayerNorm, Reduce, RMSNorm
from tersor.ir.dims import Dim

RNG = np.random.default_rng(0)
BATCH, LENGTH = Dim.symbol("batch"), Dim.symbol("length")
RESIDUAL = Chain(
    (ChainInput("full"), ChainInput("full"), ChainInput("column")),
    (Step("add", (0, 1)), Step("add", (3, 2))),
    (4,),
)


def array(*shape):
    return RNG.standard_normal(shape, dtype=np.float32)


def reference(kind, x, weight=None, bias=None, eps=1e-5):
    x = torch.from_numpy(np.asarray(x, np.float64))
    if kind is LayerNorm:
        x = x - x.mean(-1, keepdim=True)
    x = x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps)
    return (x.numpy() * (1 if weight is None else weight)) + (0 if bias is None else bias)


@pytest.mark.parametrize("kind", [LayerNorm, RMSNorm])
@pytest.mark.parametrize("size", [1, 2, 8, 15, 16, 17, 48, 100, 384, 768])
def test_sizes(kind, size, target):
    x, w, b = array(3, size), array(size), array(size)
    (got,) = run_kernel(kind((3,), size), [x, w, b], target)
    np.testing.assert_allclose(got, reference(kind, x, w, b), atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("kind", [LayerNorm, RMSNorm])
@pytest.mark.parametrize(("weight", "bias"), [(False, False), (True, False), (False, True)])
def test_optional_operands(kind, weight, bias, target):
    x, w, b = array(5, 40), array(40), array(40)
    kernel = kind((5,), 40, eps=1e-12, weight=weight, bias=bias)
    (got,) = run_kernel(kernel, [x, *([w] if weight else []), *([b] if bias else [])], target)
    expected = reference(kind, x, w if weight else None, b if bias else None, 1e-12)
    np.testing.assert_allclose(got, expected, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("kind", [LayerNorm, RMSNorm])
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("size", [37, 64])
def test_residual_chain(kind, keep, size, target):
    kernel = kind((BATCH, LENGTH), size, chain=RESIDUAL, keep_input=keep)
    w, b, more = array(size), array(size), array(size)
    for shape in [(1, 1), (2, 7), (4, 33), (8, 128)]:
        x, y = array(*shape, size), array(*shape, size)
        results = run_kernel(kernel, [x, y, more, w, b], target)
        total = x + y + more
        np.testing.assert_allclose(results[0], reference(kind, total, w, b), atol=3e-6, rtol=3e-6)
        if keep:
            np.testing.assert_array_equal(results[1], total)


def test_large_mean_costs_no_digits(target):
    x = array(4, 256) + 1000
    (got,) = run_kernel(LayerNorm((4,), 256, weight=False, bias=False), [x], target)
    np.testing.assert_allclose(got, reference(LayerNorm, x), atol=2e-4)


def test_chain_with_a_row_operand(target):
    chain = Chain((ChainInput("full"), ChainInput("row")), (Step("mul", (0, 1)),), (2,))
    x, scale = array(6, 50), array(6, 1)
    kernel = LayerNorm((6,), 50, weight=False, bias=False, chain=chain)
    (got,) = run_kernel(kernel, [x, scale], target)
    np.testing.assert_allclose(got, reference(LayerNorm, x * scale), atol=2e-6, rtol=2e-6)


def test_chain_needs_one_output():
    with pytest.raises(ValueError, match="one f32 output"):
        LayerNorm((3,), 8, chain=Chain((ChainInput("full"),), (), (0, 0)))


NUMPY = {"sum": np.sum, "mean": np.mean, "max": np.max, "min": np.min}


@pytest.mark.parametrize("op", NUMPY)
@pytest.mark.parametrize(
    ("shape", "dims"),
    [
        ((5,), (0,)),
        ((3, 33), (1,)),
        ((3, 33), (0,)),
        ((2, 5, 7, 17), (2, 3)),
        ((2, 5, 7, 17), (0, 2)),
        ((2, 5, 7, 17), (1, 3)),
        ((2, 5, 7, 17), (0, 1, 2, 3)),
        ((1, 4, 1, 9), (1,)),
        ((8, 128, 48), (1,)),
    ],
)
def test_reduce(op, shape, dims, target):
    x = array(*shape)
    for keepdims in (False, True):
        (got,) = run_kernel(Reduce(op, shape, dims, keepdims), [x], target)
        expected = NUMPY[op](x.astype(np.float64), axis=dims, keepdims=keepdims)
        assert got.shape == expected.shape
        np.testing.assert_allclose(got, expected, atol=2e-5, rtol=1e-6)


def test_reduce_symbolic_sizes(target):
    kernel = Reduce("mean", (BATCH, LENGTH, 20), (1,))
    for b, t in [(1, 1), (2, 5), (3, 64)]:
        x = array(b, t, 20)
        np.testing.assert_allclose(run_kernel(kernel, [x], target)[0], x.mean(1), atol=1e-6)


@pytest.mark.parametrize("op", ["sum", "max", "min"])
def test_reduce_integers(op, target):
    x = RNG.integers(-100, 100, (6, 37))
    for dims in ((0,), (1,)):
        (got,) = run_kernel(Reduce(op, (6, 37), dims, dtype="int64"), [x], target)
        np.testing.assert_array_equal(got, NUMPY[op](x, axis=dims))


def test_any_and_all_are_maximum_and_minimum_of_bools(target):
    x = RNG.random((20, 37)) < 0.05
    for op, function in (("max", np.any), ("min", np.all)):
        for dims in ((0,), (1,)):
            (got,) = run_kernel(Reduce(op, (20, 37), dims, dtype="bool"), [x], target)
            np.testing.assert_array_equal(got, function(x, axis=dims))


def test_reduce_refuses_a_dimension_that_is_not_there():
    with pytest.raises(ValueError, match="cannot reduce"):
        Reduce("sum", (3, 4), (2,))
