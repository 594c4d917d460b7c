"""Kernels as plain C functions give what the same kernels give in TVM's runtime, here and on an emulated CPU."""

from __future__ import annotations

import numpy as np
import pytest

from tersor.codegen.export.functions import plain_kernel
from tersor.codegen.kernels.attention import Attention
from tersor.codegen.kernels.base import Kernel
from tersor.codegen.kernels.cache import CacheUpdate
from tersor.codegen.kernels.gemm import Gemm
from tersor.codegen.kernels.scan import CumSum
from tersor.codegen.packing import pack
from tersor.codegen.tiles import panel_width
from tersor.ir.dims import Dim
from tersor.targets import resolve
from tests.codegen.kernel_harness import run_kernel
from tests.codegen.plain_harness import run_plain

N = Dim.symbol("n")
HOST = resolve("x86-64-v3")


def arrays(kernel: Kernel, n: int) -> list[np.ndarray]:
    generator = np.random.default_rng(n)
    shapes = [tuple(n if isinstance(d, Dim) else d for d in spec.shape) for spec in kernel.inputs()]
    return [generator.standard_normal(shape).astype(np.float32) for shape in shapes]


@pytest.mark.parametrize("n", [1, 7, 400])
@pytest.mark.parametrize("offset", [0, 4])
def test_a_gemm_at_any_length_and_alignment(n, offset):
    kernel = Gemm((N,), 48, 80, panel=panel_width(HOST))
    generator = np.random.default_rng(n)
    x, w = generator.standard_normal((n, 48)), generator.standard_normal((80, 48))
    given = [x.astype(np.float32), pack([w.astype(np.float32)], panel_width(HOST))]
    (found,) = run_plain(kernel, given, HOST, offset=offset)
    np.testing.assert_array_equal(found, run_kernel(kernel, given, HOST)[0])


@pytest.mark.parametrize("n", [3, 130])
def test_temporaries_of_an_attention_lie_in_scratch_memory(n):
    kernel = Attention(1, N, N, 4, 2, 24, 24, 0.2, causal=True)
    given = arrays(kernel, n)
    (found,) = run_plain(kernel, given, HOST)
    np.testing.assert_array_equal(found, run_kernel(kernel, given, HOST)[0])
    small, large = (plain_kernel("k", kernel.build(HOST)).scratch([(n, n)]) for n in (16, 1024))
    assert 0 < small < large < 1 << 20


@pytest.mark.parametrize("cpu", ["cortex-a53", "max"])
def test_a_kernel_for_another_cpu_runs_under_emulation(cpu):
    target = resolve("armv8-a")
    kernel = CumSum((N, 600), 1)
    (x,) = arrays(kernel, 300)
    (found,) = run_plain(kernel, [x], target, cpu=cpu)
    np.testing.assert_allclose(found, np.cumsum(x.astype(np.float64), 1), atol=1e-4)


def test_an_assertion_that_does_not_hold_is_a_status():
    kernel = CacheUpdate((2, 16, 8), 1, N, in_place=False)
    value, old = np.ones((2, 3, 8), np.float32), np.zeros((2, 16, 8), np.float32)
    (found,) = run_plain(kernel, [value, np.int64(13), old], HOST)
    np.testing.assert_array_equal(found[:, 13:], value)
    assert not found[:, :13].any()
    with pytest.raises(AssertionError, match="exit code 1"):
        run_plain(kernel, [value, np.int64(14), old], HOST)


def test_loops_with_and_without_threads_share_their_code():
    function = plain_kernel("k", Gemm((N,), 48, 80, panel=16).build(HOST))
    assert len(function.parts) == 1
