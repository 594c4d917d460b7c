"""Latency by kernel: more work takes longer, equal kernels are timed once, foreign targets are refused."""

from __future__ import annotations

import pytest
import torch

from tersor.codegen import latency
from tersor.codegen.latency import Latency
from tersor.errors import TargetError
from tersor.ir import Dim, Program, Range, Value
from tersor.targets import Target, resolve


def stack(layers: int) -> Program:
    program = Program()
    function = program.add_function("main", {"n": Range(1, 64)})
    x = function.add_input("x", Value("float32", (Dim.symbol("n"), 256)))
    b = function.builder()
    for _ in range(layers):
        x = b.linear(x, b.parameter("w", torch.randn(256, 256)))
    function.set_outputs({"y": x})
    return program


def test_equal_kernels_are_timed_once(monkeypatch):
    timed = []
    monkeypatch.setattr(latency, "seconds_per_call", lambda kernel, target: timed.append(kernel) or 1.0)
    measure = Latency(resolve("native"))
    assert measure(stack(3)) == 3.0 and measure(stack(5)) == 5.0
    assert len(timed) == 1 and timed[0].lead == (64,)
    assert Latency(resolve("native"), {"n": 8})(stack(2)) == 2.0 and timed[1].lead == (8,)


def test_the_time_of_a_kernel_is_that_of_the_sites_it_serves(monkeypatch):
    """Two projections of one input are one kernel: each has the part of its products; the rest goes by itself."""
    seconds = {"Gemm": 4.0, "Attention": 2.0, "Softmax": 1.0}
    monkeypatch.setattr(latency, "seconds_per_call", lambda kernel, target: seconds[type(kernel).__name__])
    program = Program()
    function = program.add_function("main", {"n": Range(1, 64)})
    x = function.add_input("x", Value("float32", (1, Dim.symbol("n"), 64)))
    b = function.builder()
    sizes = {"q": 64, "k": 32, "v": 32}
    q, k, v = (b.linear(x, b.parameter(name, torch.randn(size, 64))) for name, size in sizes.items())
    mixed = b.attention(q, k, v, heads=2, kv_heads=1, scale=0.2)
    for node, site in zip((q, k, v, mixed), ("query", "key", "value", "attention"), strict=True):
        node.meta["site"] = site
    function.set_outputs({"y": b.softmax(mixed, dim=-1)})
    assert Latency(resolve("native")).by_site(program) == {
        "query": 2.0,
        "key": 1.0,
        "value": 1.0,
        "attention": 2.0,
        "": 1.0,
    }


def test_a_real_timing_is_positive_and_finite():
    assert 0 < Latency(resolve("native"))(stack(1)) < 1


def test_a_foreign_target_is_refused():
    with pytest.raises(TargetError, match="aarch64"):
        Latency(Target("board", "aarch64"))
