"""Codes and scales against the dialect's own definition, bit for bit: row by row, behind a chain, behind a norm."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kernel_harness import run_kernel

from tersor.codegen.kernels.chain import Chain, ChainInput, Const, Step
from tersor.codegen.kernels.elementwise import Elementwise
from tersor.codegen.kernels.norm import LayerNorm, RMSNorm
from tersor.codegen.kernels.quantize import DynamicQuantize
from tersor.ir.dims import Dim
from tersor.ir.opset.quantization import dynamic_scale, quantize

RNG = np.random.default_rng(0)
BATCH, LENGTH = Dim.symbol("batch"), Dim.symbol("length")
FULL, ACCUMULATOR = ChainInput("full"), ChainInput("accumulator")
STATIC = (
    Step("mul", (0, Const(20.0))),
    Step("round", (1,)),
    Step("add", (2, Const(128.0))),
    Step("saturate", (3,), "uint8"),
)


def array(*shape):
    return RNG.standard_normal(shape, dtype=np.float32)


def reference(x, group):
    """Codes and scales of every row."""
    x = torch.from_numpy(x)
    scale = dynamic_scale(x, group=group)
    return quantize(x, scale, 128.0, dtype="uint8", group=group).numpy(), scale.numpy()


def check_rows(codes, scale, x):
    scales = scale.shape[-1]
    expected, expected_scale = reference(x, x.shape[-1] // scales if scales > 1 else None)
    np.testing.assert_array_equal(scale, expected_scale)
    np.testing.assert_array_equal(codes, expected)


@pytest.mark.parametrize("size", [1, 2, 15, 16, 17, 33, 100, 384])
def test_sizes(size, target):
    x = array(5, size)
    check_rows(*run_kernel(DynamicQuantize((5,), size), [x], target), x)


def test_symbolic_rows_of_every_magnitude(target):
    kernel = DynamicQuantize((BATCH, LENGTH), 50)
    for shape in [(1, 1), (3, 7), (8, 128)]:
        x = array(*shape, 50) * np.float32(10.0) ** RNG.integers(-20, 20, (*shape, 1))
        x = x.astype(np.float32)
        check_rows(*run_kernel(kernel, [x], target), x)


@pytest.mark.parametrize(("size", "scales"), [(96, 2), (160, 5), (32, 2)])
def test_a_scale_for_every_group(size, scales, target):
    x = array(3, 4, size) * np.float32(10.0) ** RNG.integers(-3, 3, (3, 4, size))
    x = x.astype(np.float32)
    x[0, 0, : size // scales] = 0
    codes, scale = run_kernel(DynamicQuantize((BATCH, LENGTH), size, scales=scales), [x], target)
    check_rows(codes, scale, x)
    normal = run_kernel(LayerNorm((3, 4), size, weight=False, bias=False), [x], target)[0]
    kernel = LayerNorm((3, 4), size, weight=False, bias=False, scales=scales)
    check_rows(*run_kernel(kernel, [x], target), normal)


def test_zeros_constants_and_ties(target):
    x = np.zeros((6, 20), np.float32)
    x[1], x[2], x[3, 7] = 3.5, -3.5, -2.0
    x[4] = np.linspace(-127, 127, 20).round() + 0.5
    x[4, 0], x[5] = 127, np.arange(20) + 0.5
    x[5, 3] = -127
    codes, scale = run_kernel(DynamicQuantize((6,), 20), [x], target)
    check_rows(codes, scale, x)
    assert (codes[0] == 128).all() and scale[0] == 1
    assert (codes[1] == 255).all() and (codes[2] == 1).all()
    assert codes[5, 0] == codes[5, 19] - 20 == 128  # 0.5 and 19.5 to even


@pytest.mark.parametrize("size", [20, 33])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_shows(bad, size, target):
    x = array(4, size)
    x[2, size - 1] = bad
    codes, scale = run_kernel(DynamicQuantize((4,), size), [x], target)
    with np.errstate(invalid="ignore"):
        values = (codes.astype(np.float32) - 128) * scale
    assert not np.isfinite(values[2]).all()
    kept = [0, 1, 3]
    check_rows(codes[kept], scale[kept], x[kept])


def test_chain_with_a_second_output(target):
    """gelu(x) + y, quantized and kept."""
    chain = Chain((FULL, FULL), (Step("gelu_erf", (0,)), Step("add", (2, 1))), (3, 3))
    kernel = DynamicQuantize((7,), 40, chain)
    assert [spec.dtype for spec in kernel.outputs()] == ["uint8", "float32", "float32"]
    x, y = array(7, 40), array(7, 40)
    codes, scale, kept = run_kernel(kernel, [x, y], target)
    np.testing.assert_allclose(kept, torch.nn.functional.gelu(torch.from_numpy(x)).numpy() + y, atol=4e-6)
    check_rows(codes, scale, kept)


@pytest.mark.parametrize("kind", [LayerNorm, RMSNorm])
@pytest.mark.parametrize("size", [17, 64, 100])
def test_norm_with_codes_of_static_scale(kind, size, target):
    """Codes, the f32 values, and the residual stream from one kernel."""
    residual = Chain((FULL, FULL), (Step("add", (0, 1)),), (2,))
    epilogue = Chain((ACCUMULATOR,), STATIC, (4, 0))
    kernel = kind((BATCH, LENGTH), size, chain=residual, keep_input=True, epilogue=epilogue)
    x, y, w, b = array(2, 5, size), array(2, 5, size), array(size), array(size)
    codes, normal, kept = run_kernel(kernel, [x, y, w, b], target)
    np.testing.assert_array_equal(kept, x + y)
    (plain,) = run_kernel(kind((BATCH, LENGTH), size, chain=residual), [x, y, w, b], target)
    np.testing.assert_array_equal(normal, plain)
    expected = quantize(torch.from_numpy(normal), torch.tensor(0.05), torch.tensor(128.0), dtype="uint8")
    np.testing.assert_array_equal(codes, expected.numpy())


@pytest.mark.parametrize("kind", [LayerNorm, RMSNorm])
@pytest.mark.parametrize("size", [17, 64, 100])
def test_norm_with_codes_of_dynamic_scale(kind, size, target):
    epilogue = Chain((ACCUMULATOR,), (), (0, 0))
    kernel = kind((BATCH, LENGTH), size, keep_input=True, epilogue=epilogue, scales=1)
    assert [spec.dtype for spec in kernel.outputs()] == ["uint8", "float32", "float32", "float32"]
    x, w, b = array(3, 4, size), array(size), array(size)
    codes, scale, normal, kept = run_kernel(kernel, [x, w, b], target)
    np.testing.assert_array_equal(kept, x)
    np.testing.assert_array_equal(normal, run_kernel(kind((BATCH, LENGTH), size), [x, w, b], target)[0])
    check_rows(codes, scale, normal)
    only = kind((BATCH, LENGTH), size, scales=1)
    for got, expected in zip(run_kernel(only, [x, w, b], target), (codes, scale), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_norm_of_codes_with_every_kind_of_operand(target):
    """The residual stream is dequantized on the way in; a row and a column factor on the way out; bf16 results."""
    inward = Chain(
        (ChainInput("full", "uint8"), ChainInput("scalar")),
        (Step("sub", (0, Const(128.0))), Step("mul", (2, 1))),
        (3,),
    )
    outward = Chain(
        (ACCUMULATOR, ChainInput("row"), ChainInput("column"), FULL),
        (Step("mul", (0, 1)), Step("mul", (4, 2)), Step("add", (5, 3)), Step("cast", (6,), "bfloat16")),
        (7,),
    )
    kernel = RMSNorm((6,), 49, weight=False, bias=False, chain=inward, epilogue=outward)
    codes = RNG.integers(0, 256, (6, 49), dtype=np.uint8)
    scale, row, column, full = np.array(0.1, np.float32), array(6, 1), array(49), array(6, 49)
    (got,) = run_kernel(kernel, [codes, scale, row, column, full], target)
    x = (codes.astype(np.float64) - 128) * 0.1
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * row * column + full
    assert str(got.dtype) == "bfloat16"
    np.testing.assert_allclose(got.astype(np.float32), expected, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("size", [1, 16, 17, 33, 100])
def test_element_by_element(size, target):
    """Two kinds of codes and a bf16 copy in one kernel; then the way back."""
    steps = (*STATIC, Step("saturate", (2,), "int8"), Step("cast", (0,), "bfloat16"))
    kernel = Elementwise(Chain((FULL,), steps, (4, 5, 6)), ((3, size),), (3, size))
    x = array(3, size) * 5
    unsigned, signed, half = run_kernel(kernel, [x], target)
    whole = np.rint(x * np.float32(20))
    np.testing.assert_array_equal(unsigned, (whole + 128).clip(0, 255))
    np.testing.assert_array_equal(signed, whole.clip(-128, 127))
    np.testing.assert_array_equal(half.astype(np.float32), torch.from_numpy(x).bfloat16().float().numpy())
    inputs = (ChainInput("full", "uint8"), ChainInput("full", "int8"), ChainInput("full", "bfloat16"))
    back = Chain(inputs, (Step("mul", (0, Const(0.5))), Step("add", (3, 1)), Step("add", (4, 2))), (5,))
    (got,) = run_kernel(Elementwise(back, ((3, size),) * 3, (3, size)), [unsigned, signed, half], target)
    exact = unsigned * np.float64(0.5) + signed + half.astype(np.float64)
    np.testing.assert_allclose(got, exact, rtol=1e-6, atol=1e-5)


def test_descriptions_that_cannot_be():
    codes = Chain((ACCUMULATOR,), STATIC, (4,))
    with pytest.raises(ValueError, match="row by row is f32"):
        LayerNorm((3,), 8, epilogue=codes, scales=1)
    with pytest.raises(ValueError, match="one accumulator"):
        LayerNorm((3,), 8, epilogue=Chain((FULL,), (), (0,)))
    with pytest.raises(ValueError, match="row by row is f32"):
        DynamicQuantize((3,), 8, Chain((ChainInput("full", "int32"),), (), (0,)))
    with pytest.raises(ValueError, match="groups of 16"):
        DynamicQuantize((3,), 40, scales=2)
    with pytest.raises(ValueError, match="groups of 16"):
        RMSNorm((3,), 40, scales=2)
