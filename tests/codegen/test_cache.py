"""Slices written at run-time positions: in place and into a copy, of every width, never outside."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
import tvm_ffi
from kernel_harness import compile_kernel, run_kernel

from tersor.codegen.kernels.cache import CacheUpdate
from tersor.codegen.runtime.session import OUTSIDE, aligned_zeros
from tersor.ir.dims import Dim

RNG = np.random.default_rng(0)
LENGTH, BATCH = Dim.symbol("length"), Dim.symbol("batch")


def updated(old, value, positions, dim):
    new = np.moveaxis(old.copy(), dim, 0)
    new[positions] = np.moveaxis(value, dim, 0)
    return np.moveaxis(new, 0, dim)


def data(shape, dtype):
    return (RNG.standard_normal(shape) * 50).astype(dtype)


@pytest.mark.parametrize("dtype", ["float32", "int64", "int32", "bool"])
@pytest.mark.parametrize(
    ("shape", "dim"), [((2, 9, 16), 1), ((9, 5), 0), ((2, 3, 9, 35), 2), ((3, 9), 1), ((9,), 0)]
)
@pytest.mark.parametrize("scattered", [False, True])
def test_slices_of_a_copy(shape, dim, dtype, scattered, target):
    kernel = CacheUpdate(shape, dim, LENGTH, dtype, scattered, in_place=False)
    for length, first in ((1, 0), (1, 8), (4, 3), (9, 0)):
        old, value = data(shape, dtype), data((*shape[:dim], length, *shape[dim + 1 :]), dtype)
        positions = RNG.permutation(9)[:length] if scattered else np.arange(first, first + length)
        given = positions if scattered else np.array(first)
        (got,) = run_kernel(kernel, [value, given, old], target)
        np.testing.assert_array_equal(got, updated(old, value, positions, dim))


def test_in_place_leaves_the_rest_alone(target):
    kernel = CacheUpdate((2, 9, 20), 1, LENGTH)
    call = compile_kernel(kernel, target)["main"]
    old, value = data((2, 9, 20), "float32"), data((2, 4, 20), "float32")
    state = tvm.runtime.tensor(old)
    call(tvm.runtime.tensor(value), tvm.runtime.tensor(np.array(5)), state)
    np.testing.assert_array_equal(state.numpy(), updated(old, value, np.arange(5, 9), 1))


def test_large_slices_on_several_threads(target):
    kernel = CacheUpdate((BATCH, 300, 128), 1, LENGTH, in_place=False)
    old, value = data((4, 300, 128), "float32"), data((4, 200, 128), "float32")
    (got,) = run_kernel(kernel, [value, np.array(100), old], target)
    np.testing.assert_array_equal(got, updated(old, value, np.arange(100, 300), 1))


@pytest.mark.parametrize(
    "position", [-1, 6, 9, 2**62, -(2**62), [0, 1, 2, 9], [-1, 1, 2, 3], [0, 2**62, 1, 2]]
)
def test_a_position_outside_is_an_error_and_writes_nothing(position, target):
    position = np.array(position)
    call = compile_kernel(CacheUpdate((2, 9, 8), 1, 4, scattered=position.ndim == 1), target)["main"]
    # the state's memory lies between others that must stay as they are
    memory = aligned_zeros((6, 9, 8), "float32")
    state = tvm_ffi.from_dlpack(memory[2:4])
    with pytest.raises(RuntimeError, match=OUTSIDE):
        call(tvm.runtime.tensor(np.ones((2, 4, 8), np.float32)), tvm.runtime.tensor(position), state)
    assert not memory.any()
