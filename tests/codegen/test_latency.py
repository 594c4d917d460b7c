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


def test_a_real_timing_is_positive_and_finite():
    assert 0 < Latency(resolve("native"))(stack(1)) < 1


def test_a_foreign_target_is_refused():
    with pytest.raises(TargetError, match="aarch64"):
        Latency(Target("board", "aarch64"))
