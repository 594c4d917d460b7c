"""Arithmetic in 16 bits becomes float32; rounding to 16 bits, and what is stored in them, stays."""

from __future__ import annotations

import pytest
import torch
from rewriting import B, T, canonical, names, program_of, sample

from tersor.errors import ProgramError
from tersor.ir import Program, Value, ops, register_op
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
    assert f"not in {dtype}" in notes[0]
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


@HALF
def test_a_function_that_only_moves_its_values_has_them_like_the_others(dtype):
    """A state, or a table, that another function computes with."""

    def model(b, ids):
        return b.embedding(ids, b.parameter("w", torch.randn(8, 6).to(DTYPES[dtype])))

    made = program_of(model, {"ids": Value("int64", (B, T))})
    canonicalize(made)
    assert dtypes(made) == {"float32", "int64"}


@HALF
def test_what_is_computed_of_constants_does_not_count(dtype):
    def model(b, x, ids):
        table = b.parameter("w", torch.randn(8, 6).to(DTYPES[dtype]))
        rows = b.cast(b.embedding(ids, table), dtype="float32")
        return b.mul(
            b.add(x, rows), b.cast(b.mul(b.full(shape=(), value=0.5, dtype=dtype), 2.0), dtype="float32")
        )

    made = program_of(model, {"x": Value("float32", (B, T, 6)), "ids": Value("int64", (B, T))})
    canonicalize(made)
    assert made.parameters["w"].value.dtype == dtype


@HALF
def test_padding_in_16_bits_is_widened_too(dtype):
    made = program_of(lambda b, x: b.pad(x, pads=(1, 0), value=2.0), {"x": Value(dtype, (B, T, 6))})
    canonicalize(made)
    assert dtypes(made) == {"float32"} and names(made) == ["pad"]


def test_an_operation_that_says_its_dtype_otherwise_is_named():
    if "test.narrow" not in ops:
        register_op(
            "test.narrow",
            lambda x, *, to: x.to(DTYPES[to]),
            infer=lambda x, *, to: Value(to, x.shape),
        )

    def model(b, x):
        return b.mul(b.emit("test.narrow", x, to="float16"), 2.0)

    made = program_of(model, {"x": Value("float32", (B, T, 6))})
    with pytest.raises(ProgramError, match="'test.narrow' gives float16"):
        canonicalize(made)


@HALF
def test_casts_at_the_ends_stay(dtype):
    """Half the bytes in and out of a model that computes in float32."""
    model = lambda b, x: b.cast(b.relu(b.cast(x, dtype="float32")), dtype=dtype)  # noqa: E731
    made = program_of(model, {"x": Value(dtype, (B, T, 6))})
    assert not canonical(made) and made.main.inputs["x"].dtype == dtype
