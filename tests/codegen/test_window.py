"""Pooling, depthwise convolutions, columns of windows and resampled axes against torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tersor.codegen.kernels import layout
from tersor.codegen.kernels.window import DepthwiseConv, Pool, Window
from tersor.ir import Dim, ops
from tersor.targets import resolve
from tests.codegen.kernel_harness import run_kernel

B, H = Dim.symbol("batch"), Dim.symbol("height")
TARGETS = [resolve("x86-64-v3"), resolve("native")]
SHAPES = [((5, 7), (3, 2), (1, 1)), ((9, 40), (3, 3), (2, 2)), ((6, 35), (2, 5), (1, 3))]


def close(kernel, tensors, expected, target=TARGETS[1], **more):
    (actual,) = run_kernel(kernel, [t.numpy() for t in tensors], target, **more)
    np.testing.assert_allclose(actual, expected.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name)
@pytest.mark.parametrize(("sizes", "kernel", "stride"), SHAPES)
def test_pool(target, sizes, kernel, stride):
    x = torch.randn(3, 4, *sizes)
    largest = F.max_pool2d(x, kernel, stride)
    window = Window(kernel, tuple(largest.shape[2:]), stride)
    close(Pool("max", (B, 4, *sizes), window), [x], largest, target)
    close(Pool("mean", (B, 4, *sizes), window), [x], F.avg_pool2d(x, kernel, stride), target)


def test_a_maximum_keeps_nan_and_dilation():
    x = torch.randn(1, 2, 6, 20)
    x[0, 1, 3, 5] = float("nan")
    expected = F.max_pool2d(x, 3, 1, 0, 2)
    close(Pool("max", (B, 2, 6, 20), Window((3, 3), (2, 16), dilation=(2, 2))), [x], expected)


@pytest.mark.parametrize("padding", [(1, 1), (0, 1), (1, 0)])
def test_a_mean_leaves_padding_out(padding):
    x = torch.randn(2, 3, 7, 18)
    expected = F.avg_pool2d(x, 3, 2, padding, count_include_pad=False)
    padded = F.pad(x, (padding[1],) * 2 + (padding[0],) * 2)
    window = Window((3, 3), tuple(expected.shape[2:]), (2, 2))
    close(Pool("mean", (B, 3, *padded.shape[2:]), window, padding), [padded], expected)


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name)
@pytest.mark.parametrize("multiplier", [1, 3])
@pytest.mark.parametrize(("sizes", "kernel", "stride"), SHAPES)
def test_depthwise_convolution(target, multiplier, sizes, kernel, stride):
    x, n = torch.randn(2, 4, *sizes), 4 * multiplier
    weight, bias = torch.randn(n, 1, *kernel), torch.randn(n)
    expected = F.conv2d(x, weight, bias, stride, groups=4)
    window = Window(kernel, tuple(expected.shape[2:]), stride)
    close(DepthwiseConv((B, 4, *sizes), n, window), [x, weight, bias], expected, target)
    plain = F.conv2d(x, weight, None, stride, groups=4)
    close(DepthwiseConv((B, 4, *sizes), n, window, bias=False), [x, weight], plain, target)


@pytest.mark.parametrize(("stride", "dilation"), [((1, 1), (1, 1)), ((2, 1), (1, 2)), ((3, 4), (1, 1))])
def test_unfold_makes_a_convolution_a_product(stride, dilation):
    x, weight = torch.randn(2, 3, 9, 12), torch.randn(5, 3, 3, 4)
    expected = F.conv2d(x, weight, None, stride, 0, dilation)
    unfold = layout.Unfold((B, 3, 9, 12), (3, 4), tuple(expected.shape[2:]), stride, dilation)
    (columns,) = run_kernel(unfold, [x.numpy()], TARGETS[1])
    actual = weight.reshape(5, -1) @ torch.from_numpy(columns).reshape(2, 36, -1)
    torch.testing.assert_close(actual.reshape(expected.shape), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_resample(dim):
    x, positions = torch.randn(2, 5, 6, 7), torch.randint(0, 5, (9, 3))
    weights = torch.randn(9, 3)
    expected = ops.resample(x, positions, weights, dim=dim)
    close(layout.Resample((B, 5, 6, 7), dim, 9, 3), [x, positions, weights], expected)
