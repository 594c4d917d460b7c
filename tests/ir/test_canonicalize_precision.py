"""Arithmetic in 16 bits becomes float32; rounding to 16 bits, and what is stored in them, stays."""

from __future__ import annotations

import pytest
import torch
from rewriting import B, T, canonical, names, program_of, sample

from tersor.ir import Program, Value, ops
from tersor.ir.canonicalize import canonicalize
from tersor.ir.value import DTYPES

HALF = pytest.mark.parametrize("dtype", ["float16", "bfloat16"])


def dtypes(program: Program) -> set[str]:
    return {n.meta["value"].dtype for _, n in program.nodes() if n.op != "output"}


@HALF
def test_what_is_computed_in_16_bits_is_computed_in_float32(dtype):
    """Also what a norm does that computes in float32 between two casts, and a constant that is made."""
    weight = torch.randn(8, 8).to(DTYPES[dtype])

    def model(b, x):
        y = b.linear(x, b.parameter("w", weight))
        wide = b.cast(y, dtype="float32")
        root = b.rsqrt(b.add(b.mean(b.mul(wide, wide), dims=(2,), keepdim=True), 1e-5))
        normed = b.cast(b.mul(wide, root), dtype=dtype)
        scaled = b.mul(normed, b.parameter("g", torch.ones(8).to(DTYPES[dtype]) * 2))
        return b.maximum(scaled, b.full(shape=(), value=-0.5, dtype=dtype))

    made = program_of(model, {"x": Value(dtype, (B, T, 8))})
    x = sample(made)["x"].float()
    notes = canonicalize(made)
    assert dtypes(made) == {"float32"} and names(made) == ["linear", "rms_norm", "maximum"]
    assert f"the model has in {dtype}" in notes[0]
    expected = ops.rms_norm(x @ weight.float().T, torch.full((8,), 2.0), eps=1e-5).clamp(min=-0.5)
    torch.testing.assert_close(made(x=x)["y"], expected)


@HALF
def test_states_are_widened_with_what_is_added_to_them(dtype):
    made = Program()
    function = made.add_function("main")
    x = function.add_input("x", Value(dtype, (2, 3)))
    state = function.add_state("total", Value(dtype, (2, 3)))
    total = function.builder().add(x, state)
    function.set_outputs({"y": total}, {"total": total})
    canonicalize(made)
    assert dtypes(made) == {"float32"} and made.states == {"total": Value("float32", (2, 3))}


@HALF
def test_rounding_to_16_bits_and_storing_in_them_stay(dtype):
    def model(b, x, ids):
        table = b.parameter("w", torch.randn(8, 6).to(DTYPES[dtype]))
        rounded = b.cast(b.slice(b.cast(x, dtype=dtype), dim=2, end=6), dtype="float32")
        return b.add(rounded, b.cast(b.embedding(ids, table), dtype="float32"))

    made = program_of(model, {"x": Value("float32", (B, T, 8)), "ids": Value("int64", (B, T))})
    assert not canonical(made)
    assert dtypes(made) == {"float32", "int64", dtype} and made.parameters["w"].value.dtype == dtype
