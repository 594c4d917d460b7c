"""Softmax and its logarithm against torch in f64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kernel_harness import run_kernel

from tersor.codegen.kernels.softmax import Softmax
from tersor.ir.dims import Dim

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("size", [1, 2, 7, 16, 17, 100, 512])
def test_sizes(size, log, target):
    x = 5 * RNG.standard_normal((3, 4, size), dtype=np.float32)
    x[0, 0] += 1000
    (got,) = run_kernel(Softmax((3, 4, size), log), [x], target)
    function = torch.log_softmax if log else torch.softmax
    np.testing.assert_allclose(got, function(torch.from_numpy(x).double(), -1), atol=4e-6 if log else 1e-6)


def test_symbolic_sizes(target):
    kernel = Softmax((Dim.symbol("batch"), 2, Dim.symbol("length")))
    for b, t in [(1, 1), (2, 5), (1, 64), (3, 129)]:
        x = RNG.standard_normal((b, 2, t), dtype=np.float32)
        np.testing.assert_allclose(
            run_kernel(kernel, [x], target)[0], torch.from_numpy(x).softmax(-1), atol=1e-6
        )


def test_infinite_entries_and_nan(target):
    x = np.zeros((4, 20), np.float32)
    x[3, 2] = np.nan
    x[0, 5:] = -np.inf
    x[1, :] = -np.inf
    (got,) = run_kernel(Softmax((4, 20)), [x], target)
    np.testing.assert_allclose(got, torch.from_numpy(x).softmax(-1), atol=1e-7, equal_nan=True)
