"""Kernels for ARM CPUs under emulation: integers bit for bit, floats beside the x86 kernels; what they are made of.

Each kernel is linked once (a static program) and then run for every length and emulated CPU.
"""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from tersor.codegen.compiler import prepare
from tersor.codegen.export.functions import plain_kernel
from tersor.codegen.export.objects import object_code
from tersor.codegen.export.toolchain import toolchain
from tersor.codegen.export.writer import export_c
from tersor.codegen.kernels.attention import Attention
from tersor.codegen.kernels.batched_gemm import BatchedGemm
from tersor.codegen.kernels.chain import PLAIN, Chain, ChainInput, Const, Step
from tersor.codegen.kernels.elementwise import Elementwise
from tersor.codegen.kernels.embedding import Decoding, Embedding
from tersor.codegen.kernels.gemm import Gemm
from tersor.codegen.kernels.inner_product import ACCUMULATORS, PIECE, WORDS, stored_words
from tersor.codegen.kernels.norm import LayerNorm, Reduce, RMSNorm
from tersor.codegen.kernels.prepare import Prepare
from tersor.codegen.kernels.quantize import DynamicQuantize
from tersor.codegen.kernels.softmax import Softmax
from tersor.codegen.llvm import compile_function
from tersor.codegen.packing import pack
from tersor.codegen.tiles import panel_width
from tersor.ir.dialect import ops
from tersor.ir.dims import Dim
from tersor.ir.interpreter import run as interpret
from tersor.passes import recipes
from tersor.targets import Target, missing_on_host, resolve
from tests.codegen.emulator import run
from tests.codegen.export.exported import inputs
from tests.codegen.kernel_harness import run_kernel
from tests.codegen.plain_harness import run_plain
from tests.ir import small_models

N = Dim.symbol("n")
LENGTHS = (1, 7, 64, 255)
EMULATED = [
    ("armv7-neon", "cortex-a15"),
    ("armv8-a", "cortex-a53"),
    ("armv8.2-dotprod", "cortex-a76"),
    ("armv8.2-dotprod", "neoverse-n1"),
    ("armv8.6-i8mm", "max"),
]
"""Targets that multiply bytes each in their own way, with a CPU that has just that."""

REFERENCE = resolve("x86-64-v3")
ACCUMULATOR, START, COLUMN = (
    ChainInput("accumulator", "int32"),
    ChainInput("column", "int32"),
    ChainInput("column"),
)
REQUANTIZE = Chain(
    (ACCUMULATOR, START, COLUMN),
    (
        Step("add", (0, 1)),
        Step("mul", (3, 2)),
        Step("round", (4,)),
        Step("add", (5, Const(11.0))),
        Step("saturate", (6,), "uint8"),
    ),
    (0, 7),
)
"""The accumulators, and their codes after a start and a scale."""


@pytest.fixture(autouse=True)
def linker() -> None:
    pytest.importorskip(
        "ziglang", reason="needs ziglang, which links programs for other CPUs: pip install ziglang"
    )


def multiply(
    a: np.ndarray, w: list[np.ndarray], target: Target, cpu: str, dtype: str, chain: Chain, *more, stored=None,
    groups=None,
):  # fmt: skip
    """A GEMM with symbolic rows on prepared inputs."""
    (m, k), n, words = a.shape, len(w[0]), stored_words(dtype, target, groups)
    kernel = Gemm((N,), k, n, chain, panel_width(target), len(w), dtype, words, stored, groups)
    if kernel.prepares:
        size = -(-k // words.elements) * words.elements
        (a,) = run_plain(
            Prepare((N,), k, words, dtype), [a], target, [(m + (not words.signed), size)], cpu=cpu
        )
    packed = pack(w, kernel.panel, words)
    return run_plain(kernel, [a, packed, *more], target, [(m, n)] * len(kernel.outputs()), cpu=cpu)


def exact(a: np.ndarray, w: np.ndarray) -> np.ndarray:
    """The int32 accumulators."""
    product = torch.from_numpy(a).to(torch.int64) @ torch.from_numpy(w).to(torch.int64).T
    return product.to(torch.int32).numpy()


def check_codes(a: np.ndarray, w: np.ndarray, target: Target, cpu: str) -> None:
    generator = np.random.default_rng(len(a))
    start = generator.integers(-1000, 1000, len(w), dtype=np.int32)
    scale = generator.uniform(1e-4, 1e-3, len(w)).astype(np.float32)
    sums, codes = multiply(a, [w], target, cpu, "uint8", REQUANTIZE, start, scale)
    np.testing.assert_array_equal(sums, exact(a, w))
    scaled = torch.from_numpy(exact(a, w) + start).float() * torch.from_numpy(scale)
    wanted = torch.clamp(torch.round(scaled) + 11, 0, 255).to(torch.uint8)
    np.testing.assert_array_equal(codes, wanted.numpy())


@pytest.mark.parametrize(("name", "cpu"), EMULATED)
@pytest.mark.parametrize(("k", "n"), [(67, 100), (48, 24)])
def test_integer_products(name, cpu, k, n):
    generator = np.random.default_rng(k)
    for m in LENGTHS:
        a = generator.integers(0, 256, (m, k), dtype=np.uint8)
        check_codes(a, generator.integers(-128, 128, (n, k), dtype=np.int8), resolve(name), cpu)


@pytest.mark.parametrize(("name", "cpu"), EMULATED)
@pytest.mark.parametrize("code", [0, 255])
def test_the_largest_products(name, cpu, code):
    """Two of these products do not fit 16 bits, and more than 2**16 of them not 31."""
    w = np.full((24, 48), -128, np.int8)
    check_codes(np.full((3, 48), code, np.uint8), w, resolve(name), cpu)


@pytest.mark.parametrize(("name", "cpu"), EMULATED)
def test_a_scale_for_every_group(name, cpu):
    """Of sizes so different that only sums that are exact within the groups come out right."""
    generator = np.random.default_rng(0)
    k, n, groups = 160, 24, 5
    w = generator.integers(-127, 128, (n, k), dtype=np.int8)
    w[:, : k // groups : 2] = -w[:, 1 : k // groups : 2]  # of equal codes the first group's sum is zero
    for m in LENGTHS:
        a = generator.integers(0, 256, (m, k), dtype=np.uint8)
        a[:, : k // groups] = a[:, :1]
        scales = generator.uniform(0.5, 2, (m, groups)).astype(np.float32)
        scales[:, 0] = 1e9
        (got,) = multiply(a, [w], resolve(name), cpu, "uint8", PLAIN, scales, groups=groups)
        parts = (a.astype(np.float64) - 128).reshape(m, groups, -1) * scales[..., None]
        expected = parts.reshape(m, -1) @ w.astype(np.float64).T
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1)


@pytest.mark.parametrize(("name", "cpu"), EMULATED[:2] + EMULATED[-1:])
def test_fixed_rows_and_two_weights(name, cpu):
    target, generator = resolve(name), np.random.default_rng(3)
    words = stored_words("uint8", target)
    chain = Chain((ACCUMULATOR, ACCUMULATOR), (Step("sub", (0, 1)),), (2,))
    a = generator.integers(0, 256, (21, 40), dtype=np.uint8)
    w = [generator.integers(-128, 128, (30, 40), dtype=np.int8) for _ in range(2)]
    kernel = Gemm((21,), 40, 30, chain, panel_width(target), 2, "uint8", words)
    (made,) = run_plain(Prepare((21,), 40, words), [a], target, cpu=cpu)
    (got,) = run_plain(kernel, [made, pack(w, kernel.panel, words)], target, cpu=cpu)
    np.testing.assert_array_equal(got, exact(a, w[0]) - exact(a, w[1]))


@pytest.mark.parametrize(("name", "cpu"), EMULATED[:2] + EMULATED[-1:])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_float_products(name, cpu, dtype):
    chain = Chain((ChainInput("accumulator"), COLUMN), (Step("add", (0, 1)), Step("gelu_erf", (2,))), (3,))
    generator = torch.Generator().manual_seed(5)
    w, bias = (torch.randn(*shape, generator=generator) for shape in ((100, 67), (100,)))
    for m in LENGTHS:
        a = torch.randn(m, 67, generator=generator)
        stored = [x.bfloat16() if dtype == "bfloat16" else x for x in (a, w)]
        wanted = torch.nn.functional.gelu(stored[0].double() @ stored[1].double().T + bias.double())
        arrays = [(x.view(torch.uint16) if dtype == "bfloat16" else x).numpy() for x in stored]
        (got,) = multiply(arrays[0], arrays[1:], resolve(name), cpu, dtype, chain, bias.numpy())
        np.testing.assert_allclose(got, wanted.numpy(), atol=1e-4, rtol=1e-5)


def sums_in_pieces(a: np.ndarray, w: np.ndarray) -> np.ndarray:
    """What cores with fp16 arithmetic make of a product, bit for bit: one rounding for each product and its addition,
    pieces of `PIECE` added up in f32."""
    a, w, total = a.astype(np.float64), w.astype(np.float64), np.zeros((len(a), len(w)), np.float32)
    for first in range(0, a.shape[1], PIECE):
        piece = np.zeros(total.shape, np.float16)
        for k in range(first, min(first + PIECE, a.shape[1])):
            piece = (piece + np.multiply.outer(a[:, k], w[:, k])).astype(np.float16)
        total += piece.astype(np.float32)
    return total


@pytest.mark.parametrize(("name", "cpu"), EMULATED[2:])
@pytest.mark.parametrize("k", [1, 7, 9, 67, 200])
def test_products_in_fp16(name, cpu, k):
    target, generator = resolve(name), np.random.default_rng(k)
    bias = generator.standard_normal(100).astype(np.float32)
    chain = Chain((ChainInput("accumulator"), COLUMN), (Step("add", (0, 1)), Step("gelu_erf", (2,))), (0, 3))
    w = generator.standard_normal((100, k)).astype(np.float16)
    for m in LENGTHS[:-1]:
        a = generator.standard_normal((m, k)).astype(np.float16)
        sums, out = multiply(a, [w], target, cpu, "float16", chain, bias)
        np.testing.assert_array_equal(sums, sums_in_pieces(a, w))
        exact = a.astype(np.float64) @ w.T.astype(np.float64)
        assert np.linalg.norm(sums - exact) <= 2e-3 * np.linalg.norm(exact)
        wanted = torch.nn.functional.gelu(torch.from_numpy(sums + bias).double())
        np.testing.assert_allclose(out, wanted.numpy(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [N, 37])
def test_two_weights_in_fp16(rows):
    """A right vector that is half of one matrix and half of the other; symbolic rows, and rows cut into tiles."""
    target, generator = resolve("armv8.2-dotprod"), np.random.default_rng(3)
    chain = Chain((ChainInput("accumulator"),) * 2, (Step("sub", (0, 1)),), (2,))
    a = generator.standard_normal((37, 130)).astype(np.float16)
    w = [generator.standard_normal((30, 130)).astype(np.float16) for _ in range(2)]
    kernel = Gemm((rows,), 130, 30, chain, panel_width(target), 2, "float16")
    (got,) = run_plain(kernel, [a, pack(w, kernel.panel)], target, [(37, 30)], cpu="cortex-a76")
    np.testing.assert_array_equal(got, sums_in_pieces(a, w[0]) - sums_in_pieces(a, w[1]))


@pytest.mark.parametrize(
    "form",
    [
        {},
        {"causal": True},
        {"causal": True, "window": 9},
        {"softcap": 5.0},
        {"mask": (2, 1, 1, N)},
        {"mask": (2, 1, N, N), "mask_dtype": "float32", "packed": "qkv"},
    ],
    ids=str,
)
def test_attention_in_fp16(form):
    """Beside exact products of what is rounded: head sizes that are no vectors, lengths around a piece of products."""
    target, generator = resolve("armv8.2-dotprod"), np.random.default_rng(4)
    kernel = Attention(2, N, N, 4, 2, 27, 20, 0.2, products="float16", **form)
    options = {key: form[key] for key in ("causal", "window", "softcap") if key in form}
    for n in (1, 7, 64, 150):
        arrays = []
        for spec in kernel.inputs():
            values = generator.standard_normal(tuple(n if isinstance(d, Dim) else d for d in spec.shape))
            arrays.append(values > 0 if spec.dtype == "bool" else values.astype(np.float32))
        (got,) = run_plain(kernel, arrays, target, cpu="cortex-a76")
        operands = [torch.from_numpy(a).double() if a.dtype != bool else torch.from_numpy(a) for a in arrays]
        if kernel.packed:
            operands = [*operands[0].split((4 * 27, 2 * 27, 2 * 20), -1), *operands[1:]]
        options |= {"heads": 4, "kv_heads": 2, "scale": 0.2, "products": "float16"}
        wanted = ops.attention(*operands, **options).numpy()
        assert np.linalg.norm(got - wanted) <= 2.5e-3 * np.linalg.norm(wanted)


def test_attention_in_fp16_limits_what_it_multiplies():
    """And no sum: scores of 80000, and as many equal weights of the largest values as are added up in fp16."""
    kernel = Attention(1, 1, PIECE, 1, 1, 8, 8, 0.5, products="float16")
    q, k, v = (
        np.full((1, 1, 8), 200, "float32"),
        np.full((1, PIECE, 8), 100, "float32"),
        np.full((1, PIECE, 8), -1e6, "float32"),
    )
    (got,) = run_plain(kernel, [q, k, v], resolve("armv8.2-dotprod"), cpu="cortex-a76")
    np.testing.assert_allclose(got, np.full((1, 1, 8), -65504.0), rtol=1e-3)


@pytest.mark.parametrize(("name", "cpu"), EMULATED[:3])
def test_fp16_weights_are_widened(name, cpu):
    """f32 values times fp16 weights: on cores without fp16 arithmetic, and where only the weights are narrow."""
    generator = np.random.default_rng(9)
    w = generator.standard_normal((45, 67)).astype(np.float16)
    for m in LENGTHS[:-1]:
        a = generator.standard_normal((m, 67)).astype(np.float32)
        (got,) = multiply(a, [w], resolve(name), cpu, "float32", PLAIN, stored="float16")
        np.testing.assert_allclose(got, a.astype(np.float64) @ w.T.astype(np.float64), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(("name", "cpu"), EMULATED[1:])
@pytest.mark.parametrize("words", [1, 7, 9, 20])
def test_loops_of_every_length(name, cpu, words):
    """Loops in assembly: too short for a pass, with and without words that fill no vector, every height of a tile."""
    target, generator = resolve(name), np.random.default_rng(words)
    a, w = (generator.standard_normal((rows, words)).astype(np.float32) for rows in (11, 19))
    size = words * (stored_words("uint8", target) or WORDS["uint8"]).elements
    codes = generator.integers(0, 256, (11, size), dtype=np.uint8)
    weights = generator.integers(-128, 128, (19, size), dtype=np.int8)
    for m in (2, 5, 11):
        (got,) = multiply(a[:m], [w], target, cpu, "float32", PLAIN)
        np.testing.assert_allclose(got, a[:m].astype(np.float64) @ w.T, atol=1e-5, rtol=1e-5)
        check_codes(codes[:m], weights, target, cpu)


FULL = ChainInput("full")


def function(op: str) -> Elementwise:
    return Elementwise(Chain((FULL,), (Step(op, (0,)),), (1,)), ((N, 13),), (N, 13))


CODES = (Step("round", (0,)), Step("add", (1, Const(11.0))), Step("saturate", (2,), "uint8"))
CODED = {"dtype": "uint8", "products": "uint8"}
SUMS = [
    Softmax((N, 77)),
    Softmax((3, N), log=True),
    LayerNorm((N,), 77, 1e-5),
    RMSNorm((N,), 141, chain=Chain((FULL, FULL), (Step("add", (0, 1)),), (2,)), keep_input=True),
    Reduce("mean", (3, N, 77), (0, 2)),
    Attention(2, N, N, 2, 2, 20, 17, 0.2, mask=(2, 1, 1, N)),
    Attention(1, N, N, 2, 2, 16, 16, 0.2, causal=True, window=21),
    Attention(2, N, N, 4, 2, 32, 20, 1e-4, **CODED),
    Attention(2, N, N, 2, 2, 16, 16, 1e-4, mask=(2, 1, 1, N), **CODED),
]
"""Kernels whose results depend on the order in which they sum."""

FAMILIES = [
    *map(function, ("exp", "log", "sin", "tanh", "erf", "gelu_tanh", "gelu_erf", "round", "floor", "rsqrt")),
    Elementwise(Chain((FULL,), CODES, (3,)), ((N, 13),), (N, 13)),
    Elementwise(Chain((FULL, FULL), (Step("gt", (0, 1)),), (2,)), ((N, 13), (1, 13)), (N, 13)),
    Elementwise(Chain((FULL,), (Step("cast", (0,), "int64"),), (1,)), ((N, 13),), (N, 13)),
    DynamicQuantize((N,), 70),
    DynamicQuantize((N,), 96, scales=3),
    BatchedGemm((2, N, 33), (2, N, 33), transposed=True),
    Attention(1, N, N, 4, 2, 24, 24, 0.2, causal=True),
    *SUMS,
]


def arrays_for(kernel, n: int) -> list[np.ndarray]:
    generator, arrays = np.random.default_rng(n), []
    for spec in kernel.inputs():
        shape = tuple(n if isinstance(d, Dim) else d for d in spec.shape)
        values = 3 * generator.standard_normal(shape)
        if spec.dtype == "uint8":
            arrays.append(generator.integers(0, 256, shape, dtype=np.uint8))
        else:
            values = np.abs(values) if len(shape) == 1 else values  # scales are positive
            arrays.append(values > 0 if spec.dtype == "bool" else values.astype(np.float32))
    return arrays


def check_same(found: list[np.ndarray], wanted: list[np.ndarray]) -> None:
    """The same bits, but for the sign of a zero and what a NaN carries."""
    for got, expected in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(got.view(expected.dtype), expected)


@pytest.mark.parametrize("kernel", FAMILIES, ids=lambda kernel: kernel.name())
def test_families_are_those_of_x86(kernel):
    """Bit for bit: one order of sums, the same polynomials, additions fused with the same products."""
    for n in (7, 64):
        arrays = arrays_for(kernel, n)
        found = run_plain(kernel, arrays, resolve("armv8-a"), cpu="cortex-a53")
        check_same(found, run_kernel(kernel, arrays, REFERENCE))


INTEGERS = [
    (Attention(2, N, N, 4, 2, 32, 20, 1e-4, **CODED), (7, 23, 101)),
    (Attention(1, N, N, 2, 1, 40, 16, 1e-4, mask=(1, 2, N, N), causal=True, window=21, **CODED), (7, 101)),
    (Attention(1, 3, N, 1, 1, 8, 8, 1e-4, **CODED), (40000,)),  # sums of unsigned products pass 2^31
]


@pytest.mark.parametrize(("name", "cpu"), EMULATED[3:])
@pytest.mark.parametrize(("kernel", "lengths"), INTEGERS, ids=lambda value: getattr(value, "name", str)())
def test_attention_in_integers_is_that_of_x86(kernel, lengths, name, cpu):
    for n in lengths:
        arrays = arrays_for(kernel, n)
        if n > 2**31 // 255**2:
            arrays[1:3] = [np.full_like(codes, 255) for codes in arrays[1:3]]
        check_same(run_plain(kernel, arrays, resolve(name), cpu=cpu), run_kernel(kernel, arrays, REFERENCE))


TABLES = [
    Embedding((N,), 30, 21, codes=Decoding("int8")),
    Embedding((N,), 30, 21, codes=Decoding("uint8", per_row=False, zero=117.0)),
    Embedding((N,), 30, 21, stored="bfloat16"),
    Embedding((N,), 30, 21, stored="float16"),
]


@pytest.mark.parametrize(("name", "cpu"), [EMULATED[0], EMULATED[1], EMULATED[-1]])
@pytest.mark.parametrize("kernel", TABLES, ids=lambda kernel: kernel.name())
def test_rows_of_stored_tables_are_those_of_x86(kernel, name, cpu):
    generator = np.random.default_rng(0)
    ids, table, *scales = kernel.inputs()
    bits = generator.integers(0, 256, 30 * 21 * np.dtype(table.dtype).itemsize).astype(np.uint8)
    stored = bits.view(table.dtype).reshape(table.shape)
    if kernel.stored == "float16":
        stored = generator.standard_normal(table.shape).astype(np.float16)
    given = [stored, *(np.abs(generator.standard_normal(s.shape)).astype(np.float32) for s in scales)]
    for n in (7, 64):
        arrays = [np.array([30, *generator.integers(0, 30, n - 1)]), *given]
        found = run_plain(kernel, arrays, resolve(name), cpu=cpu)
        assert np.isnan(found[0][0]).all()
        check_same(found, run_kernel(kernel, arrays, REFERENCE))


@pytest.mark.parametrize("kernel", [*SUMS, function("gelu_erf")], ids=lambda kernel: kernel.name())
def test_sums_are_the_same_in_32_bit_code(kernel):
    for n in (7, 101):
        arrays = arrays_for(kernel, n)
        found = run_plain(kernel, arrays, resolve("armv7-neon-vfp4"), cpu="cortex-a7")
        check_same(found, run_kernel(kernel, arrays, REFERENCE))


@pytest.mark.parametrize("kernel", [*SUMS, function("exp")], ids=lambda kernel: kernel.name())
def test_sums_are_the_same_in_wider_vectors(kernel):
    target = resolve("x86-64-v4")
    if missing_on_host(target):
        pytest.skip("this machine has no AVX-512")
    for n in (7, 101):
        arrays = arrays_for(kernel, n)
        check_same(run_kernel(kernel, arrays, target), run_kernel(kernel, arrays, REFERENCE))


@pytest.mark.parametrize("kernel", FAMILIES, ids=lambda kernel: kernel.name())
def test_families_agree_with_x86_without_fused_products(kernel):
    for n in (7, 64):
        arrays = arrays_for(kernel, n)
        results = zip(
            run_plain(kernel, arrays, resolve("armv7-neon"), cpu="cortex-a15"),
            run_kernel(kernel, arrays, REFERENCE),
            strict=True,
        )
        for got, wanted in results:
            if wanted.dtype == np.float32:
                np.testing.assert_allclose(got, wanted, atol=1e-4, rtol=1e-5)
            else:
                np.testing.assert_array_equal(got.view(wanted.dtype), wanted)


def gemm(dtype: str, target: Target) -> Gemm:
    """One that has full tiles only."""
    chain = Chain((ChainInput("accumulator", ACCUMULATORS[dtype]),), (), (0,))
    return Gemm((64,), 256, 64, chain, panel_width(target), 1, dtype, stored_words(dtype, target))


def inner_loops(kernel: Gemm | BatchedGemm, target: Target) -> list[list[str]]:
    """The instructions of each innermost loop."""
    text = compile_function(kernel.build(target), target).mod.inspect_source("asm")
    labels, lines, loops = {}, [], []
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L\w+):", line):
            labels[label[1]] = len(lines)
        elif re.match(r"\s*[a-z]", line):
            lines.append(line.strip())
            branch = re.match(r"\s*b\S*\s.*?(\.L\w+)", line)
            if branch and branch[1] in labels:
                loops.append((labels[branch[1]], len(lines)))
    inner = [(s, e) for s, e in loops if not any(s <= t and u <= e and (s, e) != (t, u) for t, u in loops)]
    return [lines[start:end] for start, end in inner]


@pytest.mark.parametrize(
    ("name", "dtype", "instruction", "by_lane"),
    [
        ("armv8-a", "float32", "fmla", r"v\d+\.s\[\d\]$"),
        ("armv8.2-dotprod", "float16", "fmla", r"v\d+\.h\[\d\]$"),
        ("armv8.2-dotprod", "uint8", "sdot", r"v\d+\.4b\[\d\]$"),
        ("armv8.6-i8mm", "uint8", "usmmla", ""),
        ("armv8.6-i8mm", "bfloat16", "bfmmla", ""),
        ("armv8-a", "uint8", "smull2?", ""),
        ("armv7-neon", "float32", "vmul.f32", r"d\d+\[\d\]$"),
    ],
)
def test_inner_loops_multiply_by_lane_and_spill_nothing(name, dtype, instruction, by_lane):
    found = 0
    for loop in inner_loops(gemm(dtype, resolve(name)), resolve(name)):
        products = [line for line in loop if re.match(rf"{instruction}\s", line)]
        found = max(found, len(products))
        assert all(re.search(by_lane, line) for line in products)
        if products:  # 32-bit CPUs have too few registers for all addresses
            assert not [line for line in loop if "sp" in line and not re.match(r"ldr\tr\d", line)]
    assert found >= 16


@pytest.mark.parametrize("transposed", [False, True])
def test_whole_panels_are_read_without_branches(transposed):
    """NEON has no masked loads: LLVM would make them a branch for every lane."""
    kernel = BatchedGemm((N, 64), (N, 64) if transposed else (64, N), transposed)
    loops = inner_loops(kernel, resolve("armv8-a"))
    products = [loop for loop in loops if sum(line.startswith("fmla") for line in loop) >= 16]
    assert products
    assert all(len(re.findall(r"^(?:b|cb|tb)", "\n".join(loop), re.M)) == 1 for loop in products)


@pytest.mark.parametrize(
    ("name", "magic"),
    [
        ("armv8-a", b"\x7fELF"),
        ("armv8-a:macos", b"\xcf\xfa\xed\xfe"),
        ("iphone-15", b"\xcf\xfa\xed\xfe"),
        ("armv8-a:windows", b"\x64\xaa"),
        ("x86-64-v3:windows", b"\x64\x86"),
    ],
)
def test_objects_have_the_format_of_their_system(name, magic):
    kernel = plain_kernel("k", Softmax((N, 77)).build(resolve(name)))
    assert object_code([kernel], resolve(name)).startswith(magic)


def test_android_keeps_its_platform_register():
    target = resolve("armv8-a:android")
    kernel = Gemm((N,), 67, 100, panel=panel_width(target))
    text = compile_function(kernel.build(target), target).mod.inspect_source("asm")
    assert "x17" in text and not re.search(r"\b[xw]18\b", text)


@pytest.mark.parametrize(
    ("name", "cpu", "model", "recipe"),
    [
        ("armv7-neon", "cortex-a15", "bert", "none"),
        ("armv8-a", "cortex-a53", "bert", "none"),
        ("armv7-neon", "cortex-a15", "llama", "fp16"),
        ("armv8.2-dotprod", "cortex-a76", "llama", "fp16"),
    ],
)
def test_a_whole_model_as_c(name, cpu, model, recipe, tmp_path):
    program, _ = recipes.get(recipe).run(getattr(small_models, model)())
    target = resolve(f"{name}:linux-musl")
    folder = export_c(prepare(program, target), tmp_path / "out")
    demo = tmp_path / "demo"
    tools = toolchain(target, static=True)
    tools.link([folder / "main.c", folder / "libmodel.a"], demo, static=True, options=[f"-I{folder}"])
    function = program.functions["main"]
    for length in (1, 7):
        sizes = {"batch": 2, "length": length}
        given = inputs(program, sizes)
        (tmp_path / "in").write_bytes(b"".join(given[key].tobytes() for key in function.inputs))
        settings = [f"in={tmp_path / 'in'}", f"out={tmp_path / 'found'}"]
        settings += [f"{key}={value}" for key, value in sizes.items()]
        run(demo, target, str(folder / "weights.bin"), *settings, cpu=cpu)
        wanted = interpret(function, {key: torch.from_numpy(value) for key, value in given.items()}, {})
        flat = torch.cat([wanted[key].float().flatten() for key in function.outputs])
        found = np.fromfile(tmp_path / "found", np.float32)
        if recipe == "none":
            np.testing.assert_allclose(found, flat.numpy(), atol=1e-4, rtol=1e-4)
        else:  # sums in fp16, and values that fall on the other side of a rounding
            assert np.linalg.norm(found - flat.numpy()) <= 3e-3 * np.linalg.norm(flat.numpy())
