"""Norms, activations, linears, rotations: what is spelt out is recognised, what only looks like it is left alone."""

from __future__ import annotations

import math

import pytest
import torch
from rewriting import B, T, canonical, names, program_of, rewritten

from tersor.ir import Value
from tersor.ir.canonicalize import activations, cleanup, linear, norms

X = {"x": Value("float32", (B, T, 8))}
GENERATOR = torch.Generator().manual_seed(0)


def vector(b, name="w", size=8):
    return b.parameter(name, torch.randn(size, generator=GENERATOR))


def mean(b, x, dims=(2,)):
    return b.mean(x, dims=dims, keepdim=True)


def centred(b, x):
    return b.sub(x, mean(b, x))


def by_rsqrt(b, x):
    return b.mul(x, b.rsqrt(b.add(mean(b, b.mul(x, x)), 1e-5)))


def by_sqrt(b, x):
    return b.div(x, b.sqrt(b.add(mean(b, b.pow(x, 2)), 1e-5)))


def by_power(b, x):
    return b.mul(b.pow(b.add(1e-5, mean(b, b.pow(x, 2))), -0.5), x)


@pytest.mark.parametrize("form", [by_rsqrt, by_sqrt, by_power])
def test_layer_norms_in_every_form(form):
    def model(b, x):
        y = form(b, centred(b, x))
        return b.add(b.mul(vector(b), y), vector(b, "c"))

    program = program_of(model, X)
    canonical(program)
    (node,) = program.main.calls()
    assert node.target.name == "layer_norm" and node.kwargs["eps"] == 1e-5 and len(node.args) == 3


def test_a_layer_norm_with_its_weight_in_the_scale():
    """TensorFlow's way: x * s + (bias - mean * s)."""

    def model(b, x):
        average = mean(b, x)
        variance = mean(b, b.pow(b.sub(x, average), 2))
        scale = b.mul(b.rsqrt(b.add(variance, 1e-5)), vector(b))
        return b.add(b.mul(x, scale), b.sub(vector(b, "c"), b.mul(average, scale)))

    program = program_of(model, X)
    canonical(program)
    (node,) = program.main.calls()
    assert node.target.name == "layer_norm" and len(node.args) == 3


def test_a_mean_of_something_else_is_no_layer_norm():
    def model(b, x):
        variance = mean(b, b.pow(centred(b, x), 2))
        scale = b.mul(b.rsqrt(b.add(variance, 1e-5)), vector(b))
        return b.add(b.mul(x, scale), b.sub(vector(b, "c"), b.mul(mean(b, b.neg(x)), scale)))

    program = program_of(model, X)
    canonical(program)
    assert "layer_norm" not in names(program)


@pytest.mark.parametrize("form", [by_rsqrt, by_sqrt, by_power])
def test_rms_norms_in_every_form(form):
    program = program_of(lambda b, x: b.mul(form(b, x), vector(b)), X)
    canonical(program)
    assert names(program) == ["rms_norm"]


def test_a_weight_that_is_computed_from_a_parameter():
    program = program_of(lambda b, x: b.mul(by_rsqrt(b, x), b.add(vector(b), 1.0)), X)
    canonical(program)
    assert names(program) == ["rms_norm"], "1 + w is folded"


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda b, x: b.mul(x, b.rsqrt(b.add(mean(b, b.mul(x, x), (1,)), 1e-5))), "not over the last axis"),
        (lambda b, x: b.mul(x, b.rsqrt(b.add(mean(b, b.pow(x, 4)), 1e-5))), "4 is not 2"),
    ],
)
def test_what_only_looks_like_a_norm_is_left_with_the_reason(model, reason):
    program = program_of(model, X)
    report = rewritten(program, norms.RULES)
    assert "rms_norm" not in names(program)
    assert any(reason in e.reason for e in report.skipped), report.skipped


def test_a_full_tensor_is_not_a_norms_weight():
    program = program_of(lambda b, x: b.mul(by_rsqrt(b, x), b.sigmoid(x)), X)
    canonical(program)
    assert names(program) == ["rms_norm", "sigmoid", "mul"]


def erf_gelu(b, x):
    return b.mul(b.mul(x, 0.5), b.add(b.erf(b.div(x, math.sqrt(2))), 1.0))


def erf_gelu_regrouped(b, x):
    return b.mul(0.5, b.mul(b.add(1, b.erf(b.mul(x, 0.7071067))), x))


def tanh_gelu(b, x):
    inner = b.mul(b.add(x, b.mul(b.pow(x, 3.0), 0.044715)), math.sqrt(2 / math.pi))
    return b.mul(b.mul(x, 0.5), b.add(b.tanh(inner), 1.0))


def tanh_gelu_of_bloom(b, x):
    inner = b.mul(b.mul(x, 0.79788456), b.add(b.mul(b.mul(x, 0.044715), x), 1))
    return b.mul(b.mul(x, 0.5), b.add(b.tanh(inner), 1.0))


def tanh_gelu_factored(b, x):
    inner = b.mul(b.mul(x, 0.7978845608), b.add(1.0, b.mul(b.mul(x, x), 0.044715)))
    return b.mul(b.mul(0.5, x), b.add(1.0, b.tanh(inner)))


@pytest.mark.parametrize(
    ("form", "name"),
    [
        (erf_gelu, "gelu"),
        (erf_gelu_regrouped, "gelu"),
        (tanh_gelu, "gelu_tanh"),
        (tanh_gelu_factored, "gelu_tanh"),
        (tanh_gelu_of_bloom, "gelu_tanh"),
        (lambda b, x: b.mul(b.sigmoid(x), x), "silu"),
    ],
)
def test_activations_in_every_form(form, name):
    program = program_of(form, X)
    canonical(program)
    assert names(program) == [name]


def test_another_constant_is_no_gelu():
    def model(b, x):
        inner = b.mul(b.add(x, b.mul(b.pow(x, 3.0), 0.05)), math.sqrt(2 / math.pi))
        return b.mul(b.mul(x, 0.5), b.add(b.tanh(inner), 1.0))

    program = program_of(model, X)
    report = rewritten(program, activations.RULES)
    assert "gelu_tanh" not in names(program)
    assert any("0.05 is not 0.044715" in e.reason for e in report.skipped)


def test_a_sigmoid_of_something_else_is_no_silu():
    program = program_of(lambda b, x: b.mul(x, b.sigmoid(b.mul(x, 1.3))), X)
    canonical(program)
    assert names(program) == ["mul", "sigmoid", "mul"]


def test_the_sigmoid_form_of_gelu():
    program = program_of(lambda b, x: b.mul(b.sigmoid(b.mul(x, 1.702)), x), X)
    canonical(program)
    assert names(program) == ["gelu_sigmoid"]


# -- convolutions


def convolved(after, pads=(0, 1, 0, 1)):
    """A padded convolution of an image, and what follows it."""

    def model(b, x):
        weight, scale = (
            b.parameter("conv.weight", torch.randn(6, 4, 3, 3)),
            b.parameter("scale", torch.rand(6, 1, 1)),
        )
        shift = b.parameter("shift", torch.randn(1, 6, 1, 1))
        return after(b, b.conv2d(b.pad(x, pads=pads), weight, stride=(1, 2)), scale, shift)

    return program_of(model, {"x": Value("float32", (B, 4, 9, 8))})


def test_a_batch_norm_and_even_padding_go_into_the_convolution():
    program = convolved(lambda b, y, scale, shift: b.add(b.mul(y, scale), shift), pads=(1, 1, 2, 2))
    canonical(program)
    (conv,) = program.main.calls()
    assert conv.kwargs["padding"] == (2, 1) and conv.meta["site"] == "conv"
    assert [a.target for a in conv.args[1:]] == ["conv.weight", "conv.bias"]


def test_uneven_padding_and_a_shared_result_stay():
    program = convolved(lambda b, y, scale, shift: b.add(b.mul(y, scale), y))
    canonical(program)
    assert sorted(names(program)) == ["add", "conv2d", "mul", "pad"]


# -- linear


def test_products_with_parameters_become_linear_with_their_bias():
    def model(b, x):
        y = b.add(b.matmul(x, b.parameter("up", torch.randn(8, 5))), vector(b, "c", 5))
        return b.matmul(y, b.permute(b.parameter("down", torch.randn(3, 5)), dims=(1, 0)))

    program = program_of(model, X)
    canonical(program)
    assert names(program) == ["linear", "linear"]
    assert [len(n.args) for n in program.main.calls()] == [3, 2]
    assert tuple(program.parameters["up"].value.shape) == (5, 8), "transposed, under its own name"


def test_arithmetic_on_numbers_is_done():
    def model(b, x):
        return b.div(x, b.sqrt(b.mul(b.parameter("size", torch.tensor(8.0)), 2)))

    program = program_of(model, X)
    canonical(program)
    assert names(program) == ["div"] and program.main.calls("div")[0].args[1] == 4.0


def test_arithmetic_that_gives_no_number_stays():
    program = program_of(lambda b, x: b.add(x, b.log(b.parameter("zero", torch.tensor(0.0)))), X)
    report = rewritten(program, cleanup.RULES)
    assert names(program) == ["log", "add"]
    assert any("numbers alone" in e.reason for e in report.skipped)


def test_a_product_broadcasts_by_itself():
    def model(b, x):
        table = b.parameter("table", torch.randn(3, 8, 5))
        return b.matmul(x, b.expand(table, shape=(B, 3, 8, 5)))

    program = program_of(model, {"x": Value("float32", (B, 3, T, 8))})
    canonical(program)
    assert names(program) == ["matmul"]


def test_a_product_keeps_an_expansion_that_gives_it_its_shape():
    def model(b, x, y):
        return b.matmul(b.expand(x, shape=(B, 3, T, 8)), b.parameter("table", torch.randn(3, 8, 5)))

    program = program_of(model, {"x": Value("float32", (B, 3, 1, 8)), "y": Value("float32", (T,))})
    canonical(program)
    assert "expand" in names(program)


def test_a_weight_that_two_products_read_stays_one():
    def model(b, x):
        w = b.parameter("w", torch.randn(8, 8))
        return b.matmul(b.tanh(b.matmul(x, w)), w)

    program = program_of(model, X)
    canonical(program)
    assert names(program) == ["linear", "tanh", "linear"] and list(program.parameters) == ["w"]
    first, second = program.main.calls("linear")
    assert first.args[1] is second.args[1]


def test_a_bias_of_another_shape_is_added_as_it_is():
    def model(b, x):
        y = b.linear(x, b.parameter("w", torch.randn(5, 8)))
        return b.add(y, b.parameter("c", torch.randn(1, 1, 5)))

    program = program_of(model, X)
    report = rewritten(program, linear.RULES)
    assert names(program) == ["linear", "add"]
    assert any("not one number per output channel" in e.reason for e in report.skipped)


def fused(b, x, interleaved):
    y = b.linear(
        x, b.parameter("p.qkv.weight", torch.randn(24, 8)), b.parameter("p.qkv.bias", torch.randn(24))
    )
    if interleaved:  # each head has its query, key and value side by side
        y = b.reshape(y, shape=(B, T, 2, 12))
        parts = [b.slice(y, dim=3, start=i * 4, end=i * 4 + 4) for i in range(3)]
        return [b.reshape(p, shape=(B, T, 8)) for p in parts]
    return [b.slice(y, dim=2, start=i * 8, end=i * 8 + 8) for i in range(3)]


@pytest.mark.parametrize("interleaved", [False, True])
def test_fused_projections_are_taken_apart_and_named(interleaved):
    def model(b, x):
        q, k, v = fused(b, x, interleaved)
        return b.attention(q, k, v, heads=2, kv_heads=2, scale=0.5)

    program = program_of(model, X)
    canonical(program)
    assert names(program) == ["linear", "linear", "linear", "attention"]
    assert {n for n in program.parameters} == {
        f"p.qkv.{role}.{kind}" for role in ("query", "key", "value") for kind in ("weight", "bias")
    }
    assert [n.meta["site"] for n in program.main.calls("linear")] == [
        "p.qkv.query",
        "p.qkv.key",
        "p.qkv.value",
    ]


def test_a_projection_whose_whole_is_used_too_stays_whole():
    def model(b, x):
        y = b.linear(x, b.parameter("w", torch.randn(16, 8)))
        halves = [b.slice(y, dim=2, start=s, end=s + 8) for s in (0, 8)]
        return b.add(b.mul(*halves), b.mean(y, dims=(2,), keepdim=True))

    program = program_of(model, X)
    canonical(program)
    assert names(program).count("linear") == 1


def test_overlapping_slices_stay():
    def model(b, x):
        y = b.linear(x, b.parameter("w", torch.randn(16, 8)))
        return b.add(b.slice(y, dim=2, start=0, end=12), b.slice(y, dim=2, start=4, end=16))

    program = program_of(model, X)
    canonical(program)
    assert names(program).count("linear") == 1


# -- cleanup


@pytest.mark.parametrize(
    "model",
    [
        lambda b, x: b.cast(x, dtype="float32"),
        lambda b, x: b.add(b.mul(b.div(x, 1), 1.0), 0),
        lambda b, x: b.slice(x, dim=2, start=0, end=8),
        lambda b, x: b.expand(x, shape=(B, T, 8)),
    ],
)
def test_what_computes_nothing_disappears(model):
    program = program_of(lambda b, x: b.neg(model(b, x)), X)
    rewritten(program, cleanup.RULES)
    assert names(program) == ["neg"]


def test_operands_that_are_one_number_everywhere_are_written_out():
    def model(b, x):
        x = b.mul(x, b.full(shape=(), value=2.0, dtype="float32"))
        x = b.div(x, b.parameter("root", torch.tensor(8.0)))
        return b.where(
            b.gt(x, b.expand(b.full(shape=(), value=0.5, dtype="float32"), shape=(B, T, 8))), x, 0.0
        )

    program = program_of(model, X)
    rewritten(program, cleanup.RULES)
    constants = [a for n in program.main.calls() for a in n.args if isinstance(a, float)]
    assert constants == [2.0, 8.0, 0.5, 0.0]


def test_a_number_that_gives_shape_or_type_stays_a_tensor():
    def model(b, x):
        y = b.add(x, b.full(shape=(2, 1), value=2.0, dtype="float32"))
        return b.mul(y, b.full(shape=(), value=1, dtype="int64"))

    program = program_of(model, {"x": Value("float32", (8,))})
    rewritten(program, cleanup.RULES)
    assert names(program) == ["full", "add"]


def test_casts_that_promotion_makes_go():
    inputs = {**X, "m": Value("int64", (B, T)), "seen": Value("bool", (B, T, 1))}

    def model(b, x, m, seen):
        y = b.mul(x, b.reshape(b.cast(m, dtype="float32"), shape=(B, T, 1)))
        return b.sub(y, b.cast(seen, dtype="float32"))

    program = program_of(model, inputs)
    rewritten(program, cleanup.RULES)
    assert names(program) == ["reshape", "mul", "cast", "sub"], "booleans have no arithmetic"


def test_adding_a_float_to_integers_is_not_nothing():
    program = program_of(lambda b, x: b.add(x, 0.0), {"x": Value("int64", (B, T))})
    rewritten(program, cleanup.RULES)
    assert names(program) == ["add"], "it makes a float"


def test_slices_compose_and_expansions_before_broadcasting_go():
    def model(b, x):
        y = b.slice(b.slice(x, dim=2, start=2, end=8), dim=2, start=1, end=4)
        return b.add(y, b.expand(b.reshape(vector(b, "w", 3), shape=(1, 1, 3)), shape=(B, T, 3)))

    program = program_of(model, X)
    rewritten(program, cleanup.RULES)
    assert names(program) == ["slice", "add"]
    assert program.main.calls("slice")[0].kwargs["start"] == 3


def test_expansions_of_joined_operands_are_one():
    def model(b, x):
        x = b.reshape(x, shape=(B, T, 1))
        return b.concat((b.expand(x, shape=(B, T, 3)), b.expand(b.neg(x), shape=(B, T, 3))), dim=1)

    program = program_of(model, {"x": Value("float32", (B, T))})
    rewritten(program, cleanup.RULES)
    assert sorted(names(program)) == ["concat", "expand", "neg", "reshape"]


def test_expansions_along_the_joined_axis_stay():
    def model(b, x):
        return b.concat(
            (b.expand(b.reshape(x, shape=(B, 1)), shape=(B, 3)), b.reshape(x, shape=(B, 1))), dim=1
        )

    program = program_of(model, {"x": Value("float32", (B,))})
    rewritten(program, cleanup.RULES)
    assert names(program).count("expand") == 1


def test_an_expansion_that_gives_the_shape_stays():
    program = program_of(
        lambda b, x: b.add(b.expand(vector(b), shape=(4, 8)), 1.0), {"x": Value("float32", (1,))}
    )
    rewritten(program, cleanup.RULES)
    assert "expand" in names(program)


def test_casts_compose_only_where_nothing_is_lost():
    def model(b, x):
        widened = b.cast(b.cast(x, dtype="int64"), dtype="float32")
        rounded = b.cast(b.cast(widened, dtype="float16"), dtype="float32")
        return b.add(widened, rounded)

    program = program_of(model, {"x": Value("int32", (B, T))})
    rewritten(program, cleanup.RULES)
    assert names(program).count("cast") == 3


def test_negated_comparisons():
    program = program_of(lambda b, x: b.logical_not(b.eq(x, 0)), {"x": Value("int64", (B, T))})
    rewritten(program, cleanup.RULES)
    assert names(program) == ["ne"]
    program = program_of(lambda b, x: b.logical_not(b.lt(x, 0.0)), X)
    rewritten(program, cleanup.RULES)
    assert names(program) == ["lt", "logical_not"], "with NaN both x < y and x >= y are false"


def test_duplicates_merge_but_numbers_of_other_types_do_not():
    program = program_of(lambda b, x: b.add(b.mul(x, 2), b.mul(x, 2)), {"x": Value("int64", (B, T))})
    assert cleanup.merge_duplicates(program.main) == 1
    program = program_of(lambda b, x: b.add(b.mul(x, 2), b.mul(x, 2.0)), {"x": Value("int64", (B, T))})
    assert cleanup.merge_duplicates(program.main) == 0


# -- rotary


def rotate(b, x, cos, sin, size=4):
    low, high = b.slice(x, dim=3, start=0, end=size // 2), b.slice(x, dim=3, start=size // 2, end=size)
    return b.add(b.mul(x, cos), b.mul(b.concat((b.neg(high), low), dim=3), sin))


def tables(b, size=4, swap=False):
    positions = b.reshape(b.cast(b.arange(end=T), dtype="float32"), shape=(1, 1, T, 1))
    angles = b.mul(positions, b.parameter("frequencies", torch.rand(size, generator=GENERATOR)))
    return b.cos(angles), b.sin(angles)


def heads(b, x, count=2):
    return b.permute(b.reshape(x, shape=(B, T, count, 8 // count)), dims=(0, 2, 1, 3))


@pytest.mark.parametrize("count", [1, 2])
def test_rotations_on_merged_heads_with_tables(count):
    size = 8 // count

    def model(b, x):
        y = rotate(b, heads(b, x, count), *tables(b, size), size)
        return b.reshape(b.permute(y, dims=(0, 2, 1, 3)), shape=(B, T, 8))

    program = program_of(model, X)
    canonical(program)
    assert sorted(names(program)) == ["rotary_embedding", "slice", "slice"]
    node = program.main.calls("rotary_embedding")[0]
    assert node.kwargs["heads"] == count
    assert all(p.value.shape == (1, 40, size) for p in program.parameters.values()), (
        "tables for the largest length"
    )


def test_rotations_of_a_part_of_each_head():
    def model(b, x):
        x = heads(b, x, 1)
        part = b.slice(x, dim=3, start=0, end=4)
        y = b.concat((rotate(b, part, *tables(b)), b.slice(x, dim=3, start=4, end=8)), dim=3)
        return b.reshape(b.permute(y, dims=(0, 2, 1, 3)), shape=(B, T, 8))

    program = program_of(model, X)
    canonical(program)
    assert sorted(names(program)) == ["rotary_embedding", "slice", "slice"]


def rotate_pairs(b, x, cos, sin, size=4, first=0):
    """GPT-J's way: channels 2i and 2i + 1 turn together."""
    shape = x.meta["value"].shape
    even, odd = (b.slice(x, dim=3, start=s, end=size, step=2) for s in (first, 1 - first))
    pairs = [b.reshape(y, shape=(*shape[:3], size // 2, 1)) for y in (b.neg(odd), even)]
    return b.add(b.mul(x, cos), b.mul(b.reshape(b.concat(pairs, dim=4), shape=shape), sin))


@pytest.mark.parametrize("heads_first", [True, False])
@pytest.mark.parametrize("part", [False, True])
def test_rotations_of_neighbours(heads_first, part):
    def model(b, x):
        x = heads(b, x, 1 if part else 2)
        cos, sin = tables(b)
        if not heads_first:
            x, cos, sin = (b.permute(y, dims=(0, 2, 1, 3)) for y in (x, cos, sin))
        if part:
            turned = rotate_pairs(b, b.slice(x, dim=3, start=0, end=4), cos, sin)
            y = b.concat((turned, b.slice(x, dim=3, start=4, end=8)), dim=3)
        else:
            y = rotate_pairs(b, x, cos, sin)
        return b.reshape(b.permute(y, dims=(0, 2, 1, 3)) if heads_first else y, shape=(B, T, 8))

    program = program_of(model, X)
    canonical(program)
    assert sorted(names(program)) == ["rotary_embedding", "slice", "slice"]
    assert program.main.calls("rotary_embedding")[0].kwargs["interleaved"] is True


def test_tables_that_are_expanded_over_the_batch_are_shared():
    def model(b, x):
        angles = b.mul(b.reshape(b.cast(b.arange(end=T), dtype="float32"), shape=(1, T, 1)), 0.1)
        angles = b.mul(angles, b.parameter("frequencies", torch.tensor([1.0, 0.5])))

        def table(half):
            half = b.expand(half, shape=(B, T, 2))
            return b.concat((half, half), dim=2)

        return b.rotary_embedding(x, table(b.cos(angles)), table(b.sin(angles)), heads=2)

    program = program_of(model, X)
    canonical(program)
    assert sorted(names(program)) == ["rotary_embedding", "slice", "slice"]


def test_neighbours_in_the_wrong_order_are_no_rotation():
    program = program_of(lambda b, x: rotate_pairs(b, heads(b, x), *tables(b), first=1), X)
    canonical(program)
    assert "rotary_embedding" not in names(program)


def test_halves_in_the_wrong_order_are_no_rotation():
    def model(b, x):
        x = heads(b, x)
        cos, sin = tables(b)
        low, high = b.slice(x, dim=3, start=0, end=2), b.slice(x, dim=3, start=2, end=4)
        return b.add(b.mul(x, cos), b.mul(b.concat((b.neg(low), high), dim=3), sin))

    program = program_of(model, X)
    canonical(program)
    assert "rotary_embedding" not in names(program)
