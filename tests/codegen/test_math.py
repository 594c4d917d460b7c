"""Element-wise functions against f64 references: error bounds, extremes, scalars and vectors, both instruction sets."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from kernel_harness import run_kernel
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from tersor.codegen.kernels.base import TensorSpec
from tersor.codegen.kernels.chain import OPS, Chain, ChainInput, Const, Step
from tersor.codegen.kernels.evaluate import AVX512, FUNCTIONS, evaluate_chain
from tersor.ir.dims import Dim

N = Dim.symbol("n")


@dataclass(frozen=True)
class Apply:
    """A chain over flat arrays, ``lanes`` elements at a time (the size must be a multiple)."""

    chain: Chain
    dtypes: tuple[str, ...]
    lanes: int

    def inputs(self):
        return tuple(TensorSpec((N,), value.dtype) for value in self.chain.inputs)

    def outputs(self):
        return tuple(TensorSpec((N,), dtype) for dtype in self.dtypes)

    def build(self, target):
        with IRBuilder() as builder:
            with T.prim_func(s_tir=True):
                T.func_name("main")
                T.func_attr({"tirx.noalias": True})
                n = T.int64()
                specs = self.inputs() + self.outputs()
                buffers = [
                    T.match_buffer(T.arg(f"p{i}", T.handle()), (n,), s.dtype) for i, s in enumerate(specs)
                ]
                count = len(self.chain.inputs)
                with T.serial(T.floordiv(n, self.lanes)) as i:
                    at = T.ramp(i * self.lanes, 1, self.lanes) if self.lanes > 1 else i
                    values = evaluate_chain(self.chain, [b[at] for b in buffers[:count]], target)
                    for buffer, value in zip(buffers[count:], values, strict=True):
                        T.buffer_store(buffer, value, [at])
        return builder.get()


def apply(target, steps, *arrays, out=("float32",), lanes=None):
    """The last steps' values for flat arrays of any size."""
    inputs = tuple(ChainInput("full", str(a.dtype)) for a in arrays)
    last = len(inputs) + len(steps)
    chain = Chain(inputs, tuple(steps), tuple(range(last - len(out), last)))
    lanes = target.vector_bits // 32 if lanes is None else lanes
    size = len(arrays[0])
    padded = [np.concatenate([a, np.ones(-size % lanes, a.dtype)]) for a in arrays]
    results = [r[:size] for r in run_kernel(Apply(chain, tuple(out), lanes), padded, target)]
    return results[0] if len(results) == 1 else results


REFERENCES = {  # op -> f64 reference, range of x, bound, scale of the error
    "exp": (torch.exp, (-87, 88), 1e-6, "relative"),
    "log": (torch.log, (1e-30, 1e4), 4e-7, "relative"),
    "sin": (torch.sin, (-1e4, 1e4), 4e-7, "absolute"),
    "cos": (torch.cos, (-1e4, 1e4), 4e-7, "absolute"),
    "tanh": (torch.tanh, (-12, 12), 8e-7, "relative"),
    "erf": (torch.erf, (-6, 6), 1.4e-6, "absolute"),
    "sigmoid": (torch.sigmoid, (-80, 80), 1e-6, "relative"),
    "silu": (torch.nn.functional.silu, (-80, 80), 1e-6, "relative"),
    "gelu_erf": (torch.nn.functional.gelu, (-40, 40), 7e-7, "scaled"),
    "gelu_tanh": (lambda x: torch.nn.functional.gelu(x, approximate="tanh"), (-40, 40), 1e-6, "scaled"),
    "gelu_sigmoid": (lambda x: x * torch.sigmoid(1.702 * x), (-40, 40), 1e-6, "scaled"),
    "sqrt": (torch.sqrt, (0, 1e6), 2e-7, "relative"),
    "rsqrt": (torch.rsqrt, (1e-6, 1e6), 3e-7, "relative"),
    "reciprocal": (torch.reciprocal, (0.01, 1e6), 2e-7, "relative"),
    "square": (torch.square, (-100, 100), 2e-7, "relative"),
    "floor": (torch.floor, (-100, 100), 0, "absolute"),
    "round": (torch.round, (-100, 100), 0, "absolute"),
    "abs": (torch.abs, (-100, 100), 0, "absolute"),
    "neg": (torch.neg, (-100, 100), 0, "absolute"),
    "relu": (torch.relu, (-100, 100), 0, "absolute"),
}


@pytest.mark.parametrize("op", REFERENCES)
def test_error_bound(op, target):
    reference, (low, high), bound, kind = REFERENCES[op]
    x = np.concatenate([np.linspace(low, high, 60001), np.linspace(max(low, -4), min(high, 4), 20001)])
    x = np.concatenate([x, np.geomspace(1e-12, 1, 2000)[np.geomspace(1e-12, 1, 2000) >= low]]).astype(
        np.float32
    )
    expected = reference(torch.from_numpy(x.astype(np.float64))).numpy()
    error = np.abs(apply(target, [Step(op, (0,))], x) - expected)
    scale = {"relative": np.abs(expected), "absolute": 1.0, "scaled": np.maximum(1, np.abs(x))}[kind]
    assert (error <= bound * scale + 1e-37).all(), f"worst {np.nanmax(error / (scale + 1e-37))}"


@pytest.mark.parametrize("op", REFERENCES)
def test_scalar_code_agrees_with_vector_code(op, target):
    x = np.linspace(0.05, 9, 160).astype(np.float32)
    error = 6e-7 if op in AVX512 else 1e-7  # a table is another approximation, as good as the polynomial
    np.testing.assert_allclose(
        apply(target, [Step(op, (0,))], x, lanes=1), apply(target, [Step(op, (0,))], x), rtol=1e-6, atol=error
    )


@pytest.mark.parametrize("op", ["gelu_erf", "gelu_tanh"])
def test_gates_are_exact_at_zero_and_relatively_right_beside_it(op, target):
    x = np.concatenate([[0.0], np.geomspace(1e-30, 0.05, 400)]).astype(np.float32)
    x = np.concatenate([x, -x])
    expected = REFERENCES[op][0](torch.from_numpy(x.astype(np.float64))).numpy()
    np.testing.assert_allclose(apply(target, [Step(op, (0,))], x), expected, rtol=1e-5, atol=0)


INF, NAN = np.inf, np.nan
EXTREMES = {  # op -> inputs and what must come out
    "exp": (
        [-INF, -1e30, -104, -88.5, 0, 88.7, 88.8, 1e10, 1e20, 1e30, INF, NAN],
        [0, 0, 0, 0, 1, 3.3265e38, INF, INF, INF, INF, INF, NAN],
    ),
    "log": ([-INF, -1, 0, 1e-45, 1, 3e38, INF, NAN], [NAN, NAN, -INF, -103.27893, 0, 88.59683, INF, NAN]),
    "tanh": ([-INF, -50, 50, INF, NAN], [-1, -1, 1, 1, NAN]),
    "erf": ([-INF, -50, 50, INF, NAN], [-1, -1, 1, 1, NAN]),
    "sigmoid": ([-INF, -1e4, 1e4, INF, NAN], [0, 0, 1, 1, NAN]),
    "silu": ([-1e4, 1e4, 3e38, INF, NAN], [0, 1e4, 3e38, INF, NAN]),
    "gelu_erf": ([-3e38, -30, -8, 30, 3e38, INF, NAN], [0, 0, 0, 30, 3e38, INF, NAN]),
    "gelu_tanh": ([-3e38, -30, -12, 30, 3e38, INF, NAN], [0, 0, 0, 30, 3e38, INF, NAN]),
    "relu": ([-INF, -0.0, INF, NAN], [0, 0, INF, NAN]),
    "sin": ([0, NAN], [0, NAN]),
}


@pytest.mark.parametrize("op", EXTREMES)
def test_extremes(op, target):
    x, expected = (np.array(v, dtype=np.float32) for v in EXTREMES[op])
    np.testing.assert_allclose(apply(target, [Step(op, (0,))], x), expected, rtol=3e-4, atol=1e-30)


def test_every_op_has_a_function():
    assert set(FUNCTIONS) | {"cast", "saturate", "pow"} == set(OPS)


@pytest.mark.parametrize("exponent", [0, 1, 2, 3, 7, 0.5, -0.5, -1, -2, 1.7, 2.5])
def test_power_of_constant(exponent, target):
    x = np.linspace(0.01, 20, 300).astype(np.float32)
    got = apply(target, [Step("pow", (0, Const(exponent)))], x)
    np.testing.assert_allclose(got, x.astype(np.float64) ** exponent, rtol=4e-6)


def test_integer_power(target):
    x = np.arange(-20, 20)
    got = apply(target, [Step("pow", (0, Const(3)))], x, out=("int64",), lanes=8)
    np.testing.assert_array_equal(got, x**3)


@pytest.mark.parametrize("op", ["add", "sub", "mul", "max", "min", "eq", "ne", "lt", "le", "gt", "ge"])
@pytest.mark.parametrize("dtype", ["float32", "int64"])
def test_binary(op, dtype, target):
    rng = np.random.default_rng(0)
    a, b = (rng.integers(-5, 6, 40).astype(dtype) for _ in range(2))
    names = {"sub": "subtract", "mul": "multiply", "max": "maximum", "min": "minimum"}
    function = getattr(torch, names.get(op, op))
    expected = function(torch.from_numpy(a), torch.from_numpy(b)).numpy()
    got = apply(target, [Step(op, (0, 1))], a, b, out=(str(expected.dtype),), lanes=8)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("op", ["max", "min"])
def test_nan_wins_on_either_side(op, target):
    a, b = np.array([NAN, 1, 2], np.float32), np.array([1, NAN, 3], np.float32)
    got = apply(target, [Step(op, (0, 1))], a, b)
    np.testing.assert_array_equal(got, [NAN, NAN, {"max": 3, "min": 2}[op]])


@pytest.mark.parametrize("op", ["max", "min"])
@pytest.mark.parametrize("bound", [-1.5, 0.0, INF, NAN])
def test_limits(op, bound, target):
    """A constant on either side: NaN stays, in the value or as the constant."""
    x = np.array([-INF, -2, -1.5, -0.5, 0, 3, INF, NAN], np.float32)
    function = {"max": torch.maximum, "min": torch.minimum}[op]
    expected = function(torch.from_numpy(x), torch.tensor(bound)).numpy()
    for operands in ((0, Const(bound)), (Const(bound), 0)):
        np.testing.assert_array_equal(apply(target, [Step(op, operands)], x, lanes=8), expected)
    whole = np.arange(-8, 8)
    got = apply(target, [Step(op, (0, Const(3)))], whole, out=("int64",), lanes=8)
    np.testing.assert_array_equal(got, {"max": np.maximum, "min": np.minimum}[op](whole, 3))


def test_bool_and_where(target):
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 2, 64).astype(bool), rng.integers(0, 2, 64).astype(bool)
    x = rng.standard_normal(64).astype(np.float32)
    for op, function in (("logical_and", np.logical_and), ("logical_or", np.logical_or), ("eq", np.equal)):
        np.testing.assert_array_equal(apply(target, [Step(op, (0, 1))], a, b, out=("bool",)), function(a, b))
    np.testing.assert_array_equal(apply(target, [Step("logical_not", (0,))], a, out=("bool",)), ~a)
    got = apply(target, [Step("where", (0, 1, Const(-INF)))], a, x)
    np.testing.assert_array_equal(got, np.where(a, x, -INF))
    steps = [Step("cast", (0,), "float32"), Step("mul", (1, 2))]
    np.testing.assert_array_equal(apply(target, steps, a, x), a * x)


@pytest.mark.parametrize("lanes", [1, None])
def test_round_is_to_even(lanes, target):
    x = np.concatenate([np.arange(-300, 300) / 2, [0.49999997, 2.5000002, -1e9, 8388609, INF, NAN]])
    x = x.astype(np.float32)
    got = apply(target, [Step("round", (0,))], x, lanes=lanes)
    np.testing.assert_array_equal(got, torch.from_numpy(x).round().numpy())


@pytest.mark.parametrize("lanes", [1, None])
@pytest.mark.parametrize(("dtype", "low", "high"), [("uint8", 0, 255), ("int8", -128, 127)])
def test_saturate(dtype, low, high, lanes, target):
    x = np.array([*range(-300, 300), -INF, -3e38, -1e10, 1e10, 3e38, INF, NAN], np.float32)
    got = apply(target, [Step("saturate", (0,), dtype)], x, out=(dtype,), lanes=lanes)
    np.testing.assert_array_equal(got[:-1], x[:-1].clip(low, high).astype(dtype))
    assert got[-1] == low


@pytest.mark.parametrize("lanes", [1, None])
def test_bf16_is_rounded_to_even(lanes, target):
    """Every upper half that is a number, with lower halves below, at and above the tie."""
    upper = np.arange(1 << 16, dtype=np.uint32)
    upper = upper[(upper & 0x7F80) != 0x7F80]
    lower = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    x = ((upper[:, None] << 16) | lower).view(np.float32).reshape(-1)
    x = np.concatenate([x, [INF, -INF, NAN, NAN]]).astype(np.float32)
    step = Step("cast", (0,), "bfloat16")
    narrow, wide = apply(
        target, [step, Step("cast", (1,), "float32")], x, out=("bfloat16", "float32"), lanes=lanes
    )
    expected = torch.from_numpy(x).bfloat16().float().numpy()
    np.testing.assert_array_equal(narrow.astype(np.float32), expected)
    np.testing.assert_array_equal(wide, expected)
    # arithmetic on bf16 is done in f32
    twice = apply(target, [Step("add", (0, 0))], narrow, lanes=lanes)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(twice, expected + expected)


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
def test_codes_become_numbers(dtype, target):
    x = np.arange(256, dtype=np.uint8).view(dtype)
    got = apply(target, [Step("cast", (0,), "float32"), Step("sub", (1, Const(7.0)))], x)
    np.testing.assert_array_equal(got, x.astype(np.float32) - 7)
    np.testing.assert_array_equal(apply(target, [Step("mul", (0, Const(0.5)))], x), x * np.float32(0.5))


@pytest.mark.parametrize("source", ["float32", "int64", "bool"])
@pytest.mark.parametrize("to", ["float32", "int64", "int32", "bool"])
def test_cast(source, to, target):
    x = np.array([-3, -1, 0, 1, 2, 100, 0, 5], np.float32) * (1.5 if source == "float32" else 1)
    x = x.astype(source)
    np.testing.assert_array_equal(
        apply(target, [Step("cast", (0,), to)], x, out=(to,), lanes=8), x.astype(to)
    )


def test_integers_mixed_with_a_float_constant_become_float(target):
    x = np.arange(16)
    got = apply(target, [Step("mul", (0, Const(0.5)))], x, lanes=8)
    np.testing.assert_array_equal(got, x * 0.5)
    got = apply(target, [Step("add", (0, Const(2)))], x, out=("int64",), lanes=8)
    np.testing.assert_array_equal(got, x + 2)


def test_long_chain_is_linear_in_its_steps(target):
    """x <- x * tanh(x) + x, thirty times: without sharing, the expression would have 3**30 leaves."""
    x = np.linspace(-0.2, 0.2, 64).astype(np.float32)
    steps, value, expected = [], 0, torch.from_numpy(x.astype(np.float64))
    for _ in range(30):
        first = 1 + len(steps)
        steps += [Step("tanh", (value,)), Step("mul", (value, first)), Step("add", (first + 1, value))]
        value, expected = first + 2, expected * torch.tanh(expected) + expected
    np.testing.assert_allclose(apply(target, steps, x), expected, rtol=1e-4, atol=1e-4)


def test_several_outputs(target):
    x = np.linspace(-2, 2, 33).astype(np.float32)
    doubled, squared = apply(
        target, [Step("add", (0, 0)), Step("mul", (0, 0))], x, out=("float32", "float32")
    )
    np.testing.assert_array_equal(doubled, x + x)
    np.testing.assert_array_equal(squared, x * x)
