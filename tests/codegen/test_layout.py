"""Layout kernels against torch, static and symbolic, on both instruction sets."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tersor.codegen.kernels import layout
from tersor.codegen.kernels.base import TensorSpec
from tersor.ir import Dim, ops
from tersor.targets import resolve
from tests.codegen.kernel_harness import run_kernel

B, T = Dim.symbol("batch"), Dim.symbol("length")
TARGETS = [resolve("x86-64-v3"), resolve("native")]


def check(kernel, tensors, expected, target=TARGETS[1], **more):
    (actual,) = run_kernel(kernel, [t.numpy() for t in tensors], target, **more)
    np.testing.assert_array_equal(actual, expected.numpy())


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name)
@pytest.mark.parametrize("sizes", [(1, 1), (2, 7), (3, 16)])
def test_permute(target, sizes):
    x = torch.randn(*sizes, 5)
    check(layout.Permute((B, T, 5), (2, 0, 1)), [x], x.permute(2, 0, 1), target)


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name)
@pytest.mark.parametrize("dims", [(1, 0, 2), (0, 2, 1, 3), (2, 0, 1, 3), (0, 2, 4, 1, 3, 5)])
def test_permute_that_keeps_the_last_dimension(target, dims):
    shape = (2, 3, 5, 4, 7, 6)[: len(dims)]
    x = torch.randn(shape)
    kernel = layout.Permute((B, T, *shape[2:]), dims)
    check(kernel, [x], x.permute(dims), target)


@pytest.mark.parametrize(("start", "length", "step"), [(0, 3, 1), (2, 2, 2), (1, 5, 1)])
def test_slice(start, length, step):
    x = torch.randn(3, 6, 4)
    expected = x[:, start : start + (length - 1) * step + 1 : step]
    check(layout.Slice((B, 6, 4), 1, start, length, step), [x], expected)


def test_slice_to_a_symbolic_length():
    x = torch.arange(40).reshape(10, 4)
    kernel = layout.Slice((10, 4), 0, 0, T, dtype="int64")
    check(kernel, [x], x[:7], output_shapes=[(7, 4)])


def test_slice_from_a_symbolic_start():
    x = torch.randn(3, 9)
    check(layout.Slice((B, T), 1, T - 1, 1), [x], x[:, -1:])


def test_slice_from_a_start_over_a_size_that_only_another_input_has():
    x, n = torch.randn(6, 2), torch.zeros(1, 3)
    size = Dim.symbol("size_2_x_length")
    kernel = layout.Slice((size, 2), 0, 2 * T - 1, 1, witnesses=(TensorSpec((1, T)),))
    check(kernel, [x, n], x[5:6])


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_concat(dim):
    sizes, shape = (2, 1, 3), [4, 5, 6]
    shape[dim] = sum(sizes)
    tensors = [torch.randn(*(s if d == dim else n for d, n in enumerate(shape))) for s in sizes]
    check(layout.Concat(tuple(shape), dim, sizes), tensors, torch.cat(tensors, dim))


def test_concat_of_symbolic_parts():
    x, y = torch.randn(3, 4), torch.randn(1, 4)
    check(layout.Concat((T + 1, 4), 0, (T, 1)), [x, y], torch.cat([x, y]), output_shapes=[(4, 4)])


def test_pad():
    x = torch.randn(2, 3, 4)
    kernel = layout.Pad((B, T, 4), ((0, 0), (1, 2), (3, 0)), value=-2.0)
    check(kernel, [x], F.pad(x, (3, 0, 1, 2), value=-2.0), output_shapes=[(2, 6, 7)])


@pytest.mark.parametrize("dim", [0, 1])
def test_index_select(dim):
    x, index = torch.randn(5, 6), torch.tensor([[0, 4, 2], [1, 1, 3]])
    expected = ops.index_select(x, index, dim=dim)
    check(layout.IndexSelect((5, 6), (B, 3), dim), [x, index], expected)


def test_one_position_without_axes():
    x, index = torch.randn(5, 6), torch.tensor(3)
    check(layout.IndexSelect((5, 6), (), 0), [x, index], x[3])
    check(layout.IndexSelect((6,), (), 0), [x[0], index], x[0, 3])


def test_positions_outside_read_nothing():
    x, index = torch.randn(5, 6), torch.tensor([-1, 5, 1 << 40, 2])
    (actual,) = run_kernel(layout.IndexSelect((5, 6), (4,), 0), [x.numpy(), index.numpy()], TARGETS[1])
    assert np.isnan(actual[:3]).all()
    np.testing.assert_array_equal(actual[3], x[2].numpy())


def test_gather():
    x, index = torch.randn(3, 6), torch.randint(0, 6, (3, 4))
    check(layout.Gather((3, 6), (3, 4), 1), [x, index], x.gather(1, index))


def test_arange_and_fill():
    check(layout.Arange(T), [], torch.arange(9), output_shapes=[(9,)])
    check(layout.Fill((B, 3), True, "bool"), [], torch.ones(2, 3, dtype=torch.bool), output_shapes=[(2, 3)])


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("size", "rotated"), [(8, 8), (12, 4), (64, 64)])
@pytest.mark.parametrize("shared", [True, False])
def test_rotary(target, interleaved, size, rotated, shared):
    x = torch.randn(2, 5, 3 * size)
    cos, sin = torch.randn(2, 1 if shared else 2, 5, rotated)
    kernel = layout.Rotary(B, T, 3, size, rotated, interleaved, shared)
    (actual,) = run_kernel(kernel, [x.numpy(), cos.numpy(), sin.numpy()], target)
    expected = ops.rotary_embedding(x, cos, sin, heads=3, interleaved=interleaved)
    torch.testing.assert_close(torch.from_numpy(actual).reshape(2, 5, -1), expected, rtol=1e-5, atol=1e-6)
