"""Attention against torch in f64: head sizes, tails in both lengths, masks of every shape, GQA, causal, packing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from kernel_harness import run_kernel

from tersor.codegen.kernels.attention import Attention
from tersor.codegen.kernels.chain import PLAIN, Chain, ChainInput, Const, Step
from tersor.ir.dims import Dim
from tersor.ir.opset.attention import attention, integer_attention

RNG = np.random.default_rng(0)
BATCH, QUERIES, KEYS = Dim.symbol("batch"), Dim.symbol("queries"), Dim.symbol("keys")


def array(*shape):
    return RNG.standard_normal(shape, dtype=np.float32)


def reference(kernel, q, k, v, mask=None):
    def split(x, heads):
        return torch.from_numpy(x).double().unflatten(-1, (heads, -1)).transpose(1, 2)

    q, k, v = split(q, kernel.heads), split(k, kernel.kv_heads), split(v, kernel.kv_heads)
    tq, tk = q.shape[2], k.shape[2]
    offset = tk - tq if kernel.align == "end" else 0
    rows, columns = torch.arange(tq).unsqueeze(1) + offset, torch.arange(tk).unsqueeze(0)
    seen = torch.ones(tq, tk, dtype=torch.bool)
    if kernel.causal:
        seen &= columns <= rows
    if kernel.window is not None:
        seen &= columns > rows - kernel.window
    bias = torch.zeros(tq, tk).double().masked_fill(~seen, -np.inf)
    if mask is not None and mask.dtype == bool:
        bias = bias + torch.zeros(mask.shape).double().masked_fill(~torch.from_numpy(mask), -np.inf)
    elif mask is not None:
        bias = bias + torch.from_numpy(mask).double()
    attention = torch.nn.functional.scaled_dot_product_attention
    out = attention(
        q, k, v, bias.expand(q.shape[0], kernel.heads, tq, tk), scale=kernel.scale, enable_gqa=True
    )
    return out.transpose(1, 2).flatten(2).numpy()


def check(kernel, target, b, tq, tk, mask=None, atol=2e-6):
    widths = (
        kernel.heads * kernel.head_dim,
        kernel.kv_heads * kernel.head_dim,
        kernel.kv_heads * kernel.value_dim,
    )
    q, k, v = (array(b, t, n).astype(kernel.dtype) for t, n in zip((tq, tk, tk), widths, strict=True))
    expected = reference(kernel, *(x.astype(np.float32) for x in (q, k, v)), mask)
    inputs = {"": [q, k, v], "qkv": [q, k, v], "kv": [q, k, v]}[kernel.packed]
    if kernel.packed == "qkv":
        inputs = [np.concatenate([q, k, v], -1)]
    elif kernel.packed == "kv":
        inputs = [q, np.concatenate([k, v], -1)]
    (got,) = run_kernel(kernel, [*inputs, *([] if mask is None else [mask])], target)
    np.testing.assert_allclose(got, expected, atol=atol)


def ragged(b, tk):
    """A padding mask [B, 1, 1, Tk]: the first sequence is full, the others end earlier."""
    lengths = np.concatenate([[tk], RNG.integers(1, tk + 1, b - 1)])
    return (np.arange(tk) < lengths[:, None])[:, None, None]


@pytest.mark.parametrize("head_dim", [8, 24, 32, 80, 128, 256])
def test_head_sizes(head_dim, target):
    check(Attention(2, 13, 13, 2, 2, head_dim, head_dim, head_dim**-0.5), target, 2, 13, 13)


@pytest.mark.parametrize(("head_dim", "value_dim"), [(16, 24), (40, 8), (5, 33)])
def test_value_size_differs(head_dim, value_dim, target):
    check(Attention(1, 9, 20, 3, 3, head_dim, value_dim, 0.3), target, 1, 9, 20)


@pytest.mark.parametrize("length", [1, 8, 9, 31, 48, 197])
def test_static_lengths(length, target):
    check(Attention(1, length, length, 2, 2, 32, 32, 0.2), target, 1, length, length)
    check(Attention(1, length, length, 2, 2, 32, 32, 0.2, causal=True), target, 1, length, length)


LENGTHS = [(1, 1), (1, 5), (2, 3), (7, 16), (8, 8), (9, 17), (16, 33), (33, 64), (65, 65), (100, 130)]


@pytest.mark.parametrize(
    ("causal", "mask"),
    [(False, "none"), (True, "none"), (False, "keys"), (True, "keys"), (True, "full"), (False, "per_head")],
)
def test_symbolic_lengths(causal, mask, target):
    shape = {
        "none": None,
        "keys": (BATCH, 1, 1, KEYS),
        "full": (BATCH, 1, QUERIES, KEYS),
        "per_head": (1, 4, QUERIES, KEYS),
    }[mask]
    kernel = Attention(BATCH, QUERIES, KEYS, 4, 2, 24, 24, 0.25, causal=causal, mask=shape)
    for i, (tq, tk) in enumerate(LENGTHS):
        b = 1 + i % 3
        sizes = {BATCH: b, QUERIES: tq, KEYS: tk}
        keep = None if shape is None else ragged(b, tk)
        if mask in ("full", "per_head"):
            keep = RNG.random([sizes.get(d, d) for d in shape]) < 0.7
        check(kernel, target, b, tq, tk, keep)


@pytest.mark.parametrize(
    "shape", [(2, 1, 1, 19), (1, 1, 11, 19), (2, 3, 11, 19), (1, 3, 1, 19), (2, 1, 11, 1), (11, 19), (1,)]
)
@pytest.mark.parametrize("dtype", ["bool", "float32"])
def test_mask_shapes(shape, dtype, target):
    mask = RNG.random(shape) < 0.8 if dtype == "bool" else array(*shape)
    check(Attention(2, 11, 19, 3, 3, 16, 16, 0.25, mask=shape, mask_dtype=dtype), target, 2, 11, 19, mask)


@pytest.mark.parametrize("heads", [(4, 1), (9, 3)])
def test_grouped_heads(heads, target):
    check(Attention(2, 17, 17, *heads, 32, 32, 0.2, causal=True), target, 2, 17, 17)


@pytest.mark.parametrize("align", ["end", "start"])
@pytest.mark.parametrize(("tq", "tk"), [(3, 40), (40, 3), (17, 33), (1, 64)])
def test_causal_alignment(align, tq, tk, target):
    """Also more queries than keys: with "end" the first queries see nothing and give zeros."""
    check(Attention(BATCH, QUERIES, KEYS, 2, 2, 16, 16, 0.25, causal=True, align=align), target, 1, tq, tk)
    if tq == 40:
        check(Attention(1, tq, tk, 2, 2, 16, 16, 0.25, causal=True, align=align), target, 1, tq, tk)


@pytest.mark.parametrize("window", [1, 20])
@pytest.mark.parametrize("causal", [False, True])
def test_window(window, causal, target):
    kernel = Attention(BATCH, QUERIES, KEYS, 2, 2, 16, 16, 0.25, causal=causal, window=window)
    for tq, tk in [(1, 1), (5, 5), (33, 33), (70, 70), (9, 50)]:
        check(kernel, target, 1, tq, tk)


@pytest.mark.parametrize("shape", [None, (1, 1, 1, 19), (2, 3, 11, 19)])
@pytest.mark.parametrize("causal", [False, True])
def test_softcap(shape, causal, target):
    """Scores of +-10 under a cap of 2; the mask is added after it."""
    q, k, v = 3 * array(2, 11, 24), 3 * array(2, 19, 24), array(2, 19, 24)
    mask = None if shape is None else array(*shape) * 5
    kernel = Attention(
        2, 11, 19, 3, 3, 8, 8, 0.25, mask=shape, mask_dtype="float32", causal=causal, softcap=2.0
    )
    (got,) = run_kernel(kernel, [q, k, v, *([] if mask is None else [mask])], target)
    q, k, v = (torch.from_numpy(x).double().unflatten(-1, (3, 8)).transpose(1, 2) for x in (q, k, v))
    scores = 2 * torch.tanh(q @ k.mT * 0.25 / 2) + (0 if mask is None else torch.from_numpy(mask).double())
    if causal:
        scores = scores.masked_fill(~torch.ones(11, 19, dtype=torch.bool).tril(8), -np.inf)
    np.testing.assert_allclose(got, (scores.softmax(-1) @ v).transpose(1, 2).flatten(2), atol=4e-6)


@pytest.mark.parametrize("packed", ["qkv", "kv"])
def test_packed_inputs(packed, target):
    length = QUERIES if packed == "qkv" else KEYS
    kernel = Attention(BATCH, QUERIES, length, 4, 2, 24, 40, 0.2, packed=packed, mask=(BATCH, 1, 1, length))
    for b, tq, tk in [(1, 1, 1), (2, 9, 9), (3, 30, 30)]:
        tk = tq if packed == "qkv" else tk + 5
        check(kernel, target, b, tq, tk, ragged(b, tk))


def test_rows_without_any_key_give_zeros(target):
    mask = np.ones((2, 1, 9, 20), bool)
    mask[0, 0, 3], mask[1] = False, False
    check(Attention(2, 9, 20, 2, 2, 16, 16, 0.25, mask=mask.shape), target, 2, 9, 20, mask)


def test_lowest_finite_mask(target):
    """An additive mask of the lowest float, as some models make it: a row of it alone gives the mean, as in torch."""
    mask = np.zeros((1, 1, 4, 20), np.float32)
    mask[0, 0, :, 15:] = np.finfo(np.float32).min
    mask[0, 0, 2] = np.finfo(np.float32).min
    kernel = Attention(1, 4, 20, 1, 1, 16, 16, 0.25, mask=mask.shape, mask_dtype="float32")
    q, k, v = array(1, 4, 16), array(1, 20, 16), array(1, 20, 16)
    (got,) = run_kernel(kernel, [q, k, v, mask], target)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    np.testing.assert_allclose(got, sdpa(*map(torch.from_numpy, (q, k, v, mask[0])), scale=0.25), atol=2e-6)
    np.testing.assert_allclose(got[0, 2], v[0].mean(0), atol=2e-6)


def test_large_scores(target):
    """Scores of +-1000 differ by more than f32's exponential reaches."""
    q, k, v = 40 * array(1, 10, 16), 40 * array(1, 40, 16), array(1, 40, 16)
    kernel = Attention(1, 10, 40, 1, 1, 16, 16, 0.25)
    (got,) = run_kernel(kernel, [q, k, v], target)
    np.testing.assert_allclose(got, reference(kernel, q, k, v), atol=2e-4)


@pytest.mark.parametrize(("batch", "heads", "length"), [(3, 4, 120), (1, 3, 121), (1, 1, 203)])
def test_enough_work_for_threads(batch, heads, length, target):
    """Also heads that do not divide among the threads, so that each is cut into runs of rows."""
    check(
        Attention(batch, length, length, heads, heads, 32, 32, 0.2, causal=True),
        target,
        batch,
        length,
        length,
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_heads": 3}, "cannot share"),
        ({"packed": "qkv", "kv_len": 9}, "one length"),
        ({"mask": (1, 1, 7, 8)}, "does not broadcast"),
        ({"epilogue": Chain((ChainInput("full"),), (), (0,))}, "one accumulator"),
    ],
)
def test_impossible_descriptions(change, message):
    fields = (
        dict(batch=1, q_len=8, kv_len=8, heads=4, kv_heads=4, head_dim=8, value_dim=8, scale=1.0) | change
    )
    with pytest.raises(ValueError, match=message):
        Attention(**fields)


def bf16_error(target):
    """What products of values near 1 in bf16 may be off by; f32 where the target multiplies nothing narrower."""
    return 2e-2 if "avx512_bf16" in target.features else 2e-6


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("head_dim", "value_dim"), [(32, 32), (64, 24), (5, 33), (80, 16)])
def test_bf16_head_sizes(dtype, head_dim, value_dim, bf16_target):
    kernel = Attention(2, 13, 20, 4, 2, head_dim, value_dim, head_dim**-0.5, dtype=dtype, products="bfloat16")
    check(kernel, bf16_target, 2, 13, 20, atol=bf16_error(bf16_target))


@pytest.mark.parametrize("length", [1, 2, 17, 48, 63])
@pytest.mark.parametrize("causal", [False, True])
def test_bf16_lengths(length, causal, bf16_target):
    kernel = Attention(
        1, length, length, 2, 2, 32, 32, 0.2, causal=causal, dtype="bfloat16", products="bfloat16", packed="qkv"
    )  # fmt: skip
    check(kernel, bf16_target, 1, length, length, atol=bf16_error(bf16_target))


@pytest.mark.parametrize("shape", [(BATCH, 1, 1, KEYS), (BATCH, 1, QUERIES, KEYS)])
@pytest.mark.parametrize("window", [None, 7])
def test_bf16_symbolic_lengths_and_masks(shape, window, bf16_target):
    kernel = Attention(
        BATCH, QUERIES, KEYS, 2, 1, 24, 24, 0.2, causal=window is not None, window=window, mask=shape,
        dtype="bfloat16", products="bfloat16",
    )  # fmt: skip
    for b, tq, tk in [(1, 1, 1), (2, 9, 33), (1, 40, 40)]:
        mask = np.broadcast_to(ragged(b, tk), (b, 1, 1 if shape[2] == 1 else tq, tk)).copy()
        check(kernel, bf16_target, b, tq, tk, mask, atol=bf16_error(bf16_target))


def test_bf16_is_rounded_where_the_program_rounds(bf16_target):
    """The same numbers become bf16 in both, so they differ by sums in f32, but for a weight here and there."""
    if "avx512_bf16" not in bf16_target.features:
        pytest.skip("this target multiplies nothing narrower than f32")
    kernel = Attention(2, 50, 50, 2, 1, 32, 32, 0.2, mask=(2, 1, 1, 50), products="bfloat16")
    q, k, v, mask = array(2, 50, 64), array(2, 50, 32), array(2, 50, 32), ragged(2, 50)
    (got,) = run_kernel(kernel, [q, k, v, mask], bf16_target)
    operands = [torch.from_numpy(x) for x in (q, k, v, mask)]
    expected = attention(*operands, heads=2, kv_heads=1, scale=0.2, products="bfloat16").numpy()
    difference = np.abs(got - expected)
    assert difference.max() < 2e-3 and (difference > 1e-5).mean() < 0.05


def test_bf16_softcap(bf16_target):
    """With equal keys all weights are equal whatever the cap; with a cap of 1 no score exceeds 1."""
    kernel = Attention(1, 3, 2, 1, 1, 16, 16, 1.0, softcap=1.0, products="bfloat16")
    q, v = np.full((1, 3, 16), 2, np.float32), array(1, 2, 16)
    k = np.zeros((1, 2, 16), np.float32)
    k[0, 1] = 1  # scores 0 and 32, capped to 0 and 1
    (got,) = run_kernel(kernel, [q, k, v], bf16_target)
    weight = np.e / (1 + np.e)
    np.testing.assert_allclose(got[0, 0], (1 - weight) * v[0, 0] + weight * v[0, 1], atol=2e-2)


@pytest.mark.parametrize("products", ["float32", "bfloat16"])
def test_epilogue(products, bf16_target):
    """Codes with a static scale after a factor per column, and a bf16 copy of the result."""
    steps = (
        Step("mul", (0, 1)),
        Step("round", (2,)),
        Step("add", (3, Const(128.0))),
        Step("saturate", (4,), "uint8"),
        Step("cast", (0,), "bfloat16"),
    )
    chain = Chain((ChainInput("accumulator"), ChainInput("column")), steps, (5, 6, 0))
    kernel = Attention(2, 9, 9, 2, 2, 24, 20, 0.2, products=products, epilogue=chain)
    factor = RNG.uniform(20, 60, 40).astype(np.float32)
    q, k, v = array(2, 9, 48), array(2, 9, 48), array(2, 9, 40)
    codes, half, wide = run_kernel(kernel, [q, k, v, factor], bf16_target)
    (plain,) = run_kernel(replace(kernel, epilogue=PLAIN), [q, k, v], bf16_target)
    np.testing.assert_array_equal(wide, plain)
    np.testing.assert_array_equal(codes, (np.rint(wide * factor) + 128).clip(0, 255))
    np.testing.assert_array_equal(half.astype(np.float32), torch.from_numpy(wide).bfloat16().float().numpy())


CODED = {"dtype": "uint8", "products": "uint8"}


def coded(kernel, b, tq, tk, extreme=False):
    """Codes for q, k and v, and the scales of the heads."""
    widths = (
        kernel.heads * kernel.head_dim,
        kernel.kv_heads * kernel.head_dim,
        kernel.kv_heads * kernel.value_dim,
    )
    lengths = (tq, tk, tk)
    if extreme:
        codes = [RNG.choice(np.uint8([0, 255]), (b, t, n)) for t, n in zip(lengths, widths, strict=True)]
    else:
        codes = [
            RNG.integers(0, 256, (b, t, n)).astype(np.uint8) for t, n in zip(lengths, widths, strict=True)
        ]
    scales = [RNG.uniform(0.5, 1.5, n).astype(np.float32) for n in (kernel.heads, kernel.kv_heads)]
    return codes, [scales[0] * np.float32(2e-4), scales[1]]


def check_codes(kernel, target, b, tq, tk, mask=None, extreme=False):
    """Heads' rows are the reference's but for rounding in f32, except the few with a weight between two codes, which
    may become either one: that moves all of the row."""
    (q, k, v), scales = coded(kernel, b, tq, tk, extreme)
    form = {name: getattr(kernel, name) for name in ("heads", "kv_heads", "causal", "window", "softcap")}
    operands = [torch.from_numpy(x) for x in (q, k, v, *scales)]
    operands += [] if mask is None else [torch.from_numpy(mask).reshape(kernel.full_mask)]
    expected = integer_attention(*operands, **form).numpy()
    inputs = {"": [[q], [k], [v]], "qkv": [[q, k, v]], "kv": [[q], [k, v]]}[kernel.packed]
    inputs = [*(np.concatenate(x, -1) for x in inputs), *scales, *([] if mask is None else [mask])]
    (got,) = run_kernel(kernel, inputs, target)
    assert np.isfinite(got).all()
    error = np.abs(got - expected).reshape(b * tq * kernel.heads, -1).max(1)
    assert (error > 2e-4).mean() <= 0.2 and error.max() < 2, f"{error.max()}, {(error > 2e-4).mean():.0%}"


@pytest.mark.parametrize(
    ("size", "value_size", "tk"), [(64, 64, 1), (64, 64, 197), (80, 80, 13), (33, 7, 13)]
)
def test_codes(size, value_size, tk, integer_target):
    kernel = Attention(2, 9, tk, 4, 2, size, value_size, 1.0, **CODED)
    check_codes(kernel, integer_target, 2, 9, tk)


def test_codes_lie_side_by_side(target):
    check_codes(Attention(2, 21, 21, 4, 4, 64, 64, 1.0, packed="qkv", **CODED), target, 2, 21, 21)


def test_extreme_codes(integer_target):
    check_codes(Attention(1, 17, 33, 2, 2, 64, 64, 1.0, **CODED), integer_target, 1, 17, 33, extreme=True)


@pytest.mark.parametrize("form", [{"causal": True}, {"causal": True, "window": 5}, {"softcap": 3.0}], ids=str)
def test_codes_on_the_diagonal(form, target):
    check_codes(Attention(1, 19, 40, 2, 2, 64, 64, 1.0, **form, **CODED), target, 1, 19, 40)


def test_masked_codes(target):
    hidden = ragged(3, 37)
    kernel = Attention(3, 11, 37, 2, 2, 64, 64, 1.0, mask=hidden.shape, **CODED)
    check_codes(kernel, target, 3, 11, 37, hidden)
    added = (RNG.standard_normal((3, 2, 11, 37)) * 2).astype(np.float32)
    added[0, 0, 3] = -np.inf
    kernel = replace(kernel, mask=added.shape, mask_dtype="float32")
    check_codes(kernel, target, 3, 11, 37, added)


def test_codes_of_any_length(target):
    kernel = Attention(BATCH, QUERIES, KEYS, 2, 2, 64, 64, 1.0, **CODED)
    for b, tq, tk in [(1, 1, 1), (2, 7, 33), (1, 40, 48)]:
        check_codes(kernel, target, b, tq, tk)


def test_codes_that_no_query_sees(target):
    """More queries than keys, aligned at the end: the first ones see nothing and get zeros."""
    kernel = Attention(1, 9, 4, 2, 2, 64, 64, 1.0, causal=True, **CODED)
    (q, k, v), scales = coded(kernel, 1, 9, 4)
    (got,) = run_kernel(kernel, [q, k, v, *scales], target)
    assert (got[0, :5] == 0).all() and (got[0, 5:] != 0).any()
    check_codes(kernel, target, 1, 9, 4)


def test_weights_in_eight_bits_of_numbers(target):
    kernel = Attention(1, 11, 37, 4, 2, 24, 24, 0.2, products="uint8")
    q, k, v = array(1, 11, 96), array(1, 37, 48), array(1, 37, 48)
    form = {"heads": 4, "kv_heads": 2, "scale": 0.2, "products": "uint8"}
    expected = attention(*map(torch.from_numpy, (q, k, v)), **form).numpy()
    (got,) = run_kernel(kernel, [q, k, v], target)
    assert (np.abs(got - expected) > 1e-5).mean() <= 1e-3
