"""Products of two activations against torch: tails, broadcast batches, transposed and symbolic operands."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kernel_harness import run_kernel

from tersor.codegen.kernels.batched_gemm import BatchedGemm
from tersor.ir.dims import Dim

RNG = np.random.default_rng(0)
B, M, K, N = (Dim.symbol(name) for name in ("batch", "m", "k", "n"))


def check(target, a_shape, b_shape, transposed, a_spec=None, b_spec=None):
    a, b = (RNG.standard_normal(shape, dtype=np.float32) for shape in (a_shape, b_shape))
    right = torch.from_numpy(b).double()
    expected = torch.from_numpy(a).double() @ (right.mT if transposed else right)
    kernel = BatchedGemm(a_spec or a_shape, b_spec or b_shape, transposed)
    (got,) = run_kernel(kernel, [a, b], target, [tuple(expected.shape)])
    np.testing.assert_allclose(got, expected, atol=2e-6 * a_shape[-1] + 1e-6, rtol=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("m, n", [(1, 45), (3, 16), (8, 45), (19, 1), (19, 16), (19, 32), (19, 45), (19, 64)])
def test_tails(m, n, transposed, target):
    check(target, (2, m, 21), (2, n, 21) if transposed else (2, 21, n), transposed)


@pytest.mark.parametrize("transposed", [False, True])
def test_two_dimensions(transposed, target):
    check(target, (9, 13), (40, 13) if transposed else (13, 40), transposed)


@pytest.mark.parametrize(
    "a_batch, b_batch", [((2, 3), (2, 3)), ((2, 1), (1, 3)), ((1, 1), (2, 3)), ((4, 2), (4, 1))]
)
def test_batch_dimensions_of_one_serve_all(a_batch, b_batch, target):
    check(target, (*a_batch, 10, 7), (*b_batch, 7, 33), False)
    check(target, (*a_batch, 10, 7), (*b_batch, 33, 7), True)


@pytest.mark.parametrize("transposed", [False, True])
def test_everything_symbolic(transposed, target):
    for b, m, k, n in [(1, 1, 1, 1), (2, 7, 5, 31), (3, 8, 16, 32), (1, 70, 64, 130), (5, 9, 3, 48)]:
        shapes = ((b, m, k), (b, n, k) if transposed else (b, k, n))
        specs = ((B, M, K), (B, N, K) if transposed else (B, K, N))
        check(target, *shapes, transposed, *specs)


def test_work_for_several_threads(target):
    check(target, (4, 100, 64), (4, 64, 96), False)
    check(target, (4, 100, 64), (1, 96, 64), True)


@pytest.mark.parametrize(
    "a, b, transposed",
    [
        ((2, 3), (4, 5), False),
        ((2, 3), (3, 5), True),
        ((2, 2, 3), (3, 3, 4), False),
        ((2, 3), (1, 3, 4), False),
    ],
)
def test_shapes_that_do_not_multiply(a, b, transposed):
    with pytest.raises(ValueError, match="cannot multiply"):
        BatchedGemm(a, b, transposed)
