"""Which nodes share a kernel, and the element-wise program each kernel gets."""

from __future__ import annotations

import pytest
import torch

from tersor.codegen.fusion import BF16, build_chain, is_decoded_rows, left_matrix, plan, stored_weight
from tersor.codegen.kernels.chain import Const
from tersor.ir import Dim, Function, Value

B, T = Dim.symbol("batch"), Dim.symbol("length")


def block() -> tuple[Function, object]:
    function = Function("main")
    x = function.add_input("x", Value("float32", (B, T, 16)))
    return function, x


def weight(function: Function, *shape: int):
    return function.builder().parameter("w", torch.randn(*shape))


def test_bias_activation_and_residual_join_the_linear():
    function, x = block()
    b = function.builder()
    y = b.add(x, b.gelu(b.linear(x, weight(function, 16, 16), weight(function, 16))))
    function.set_outputs({"y": y})
    (group,) = plan(function).groups.values()
    chain, feeds = build_chain(group)
    assert group.root is y and [a.target.name for a in group.anchors] == ["linear"]
    assert [(i.kind, i.dtype) for i in chain.inputs] == [
        ("accumulator", "float32"),
        ("column", "float32"),
        ("full", "float32"),
    ]
    assert [s.op for s in chain.steps] == ["add", "gelu_erf", "add"]
    assert feeds[1] is x


def test_a_value_read_elsewhere_ends_the_group():
    function, x = block()
    b = function.builder()
    h = b.linear(x, weight(function, 16, 16))
    y = b.add(h, x)
    function.set_outputs({"y": y, "h": h})
    groups = plan(function).groups
    assert groups[h].anchors == [h] and groups[h].members == []
    assert groups[y].anchors == [] and groups[y].members == [y]


def test_gate_and_up_share_one_kernel():
    function, x = block()
    b = function.builder()
    gate, up = b.linear(x, weight(function, 32, 16)), b.linear(x, weight(function, 32, 16))
    y = b.mul(b.silu(gate), up)
    function.set_outputs({"y": y})
    (group,) = plan(function).groups.values()
    assert group.anchors == [gate, up]
    assert [i.kind for i in build_chain(group)[0].inputs] == ["accumulator", "accumulator"]


def test_a_linear_that_meets_itself_is_computed_once():
    """x * sigmoid(1.702 x): the value is reached on two ways."""
    function, x = block()
    b = function.builder()
    h = b.linear(x, weight(function, 32, 16), weight(function, 32))
    function.set_outputs({"y": b.mul(h, b.sigmoid(b.mul(h, 1.702)))})
    (group,) = plan(function).groups.values()
    assert group.anchors == [h]
    assert [s.op for s in build_chain(group)[0].steps] == ["add", "mul", "sigmoid", "mul"]


def test_linears_of_different_inputs_stay_apart():
    function, x = block()
    b = function.builder()
    other = b.neg(x)
    y = b.add(b.linear(x, weight(function, 16, 16)), b.linear(other, weight(function, 16, 16)))
    function.set_outputs({"y": y})
    assert max(len(g.anchors) for g in plan(function).groups.values()) == 1


def test_an_operand_broadcast_over_the_batch_is_no_epilogue():
    function, x = block()
    positions = function.add_input("positions", Value("float32", (1, T, 16)))
    b = function.builder()
    h = b.linear(x, weight(function, 16, 16))
    y = b.add(h, positions)
    function.set_outputs({"y": y})
    groups = plan(function).groups
    assert groups[h].anchors == [h] and groups[y].anchors == []


def test_projections_of_one_attention_are_joined():
    function, x = block()
    b = function.builder()
    q, k, v = (b.linear(x, weight(function, 16, 16)) for _ in range(3))
    y = b.attention(q, k, v, None, heads=2, kv_heads=2, scale=0.5)
    function.set_outputs({"y": y})
    result = plan(function)
    assert result.joined[y].anchors == (q, k, v) and not result.groups


def test_a_projection_read_elsewhere_is_not_joined():
    function, x = block()
    b = function.builder()
    q, k, v = (b.linear(x, weight(function, 16, 16)) for _ in range(3))
    y = b.attention(q, k, v, None, heads=2, kv_heads=2, scale=0.5)
    function.set_outputs({"y": y, "k": k})
    assert plan(function).joined == {}


def integer_layer(function: Function, codes, scale, n: int, bias: bool = True):
    """The layer that `quantize.integers` makes of a linear one with a scale per token."""
    b = function.builder()
    stored = b.parameter("c", torch.ones(n, 16, dtype=torch.int8))
    start = b.parameter("k", torch.zeros(n, dtype=torch.int32))
    y = b.cast(b.integer_linear(codes, stored, start), dtype="float32")
    y = b.mul(b.mul(y, b.parameter("m", torch.ones(n))), scale)
    return b.add(y, b.parameter("b", torch.ones(n))) if bias else y


def test_what_follows_an_integer_product_is_its_epilogue():
    function, x = block()
    b = function.builder()
    scale = b.dynamic_scale(x)
    codes = b.quantize(x, scale, 128, dtype="uint8")
    y = b.saturate(b.round(b.gelu(integer_layer(function, codes, scale, 32))), dtype="uint8")
    function.set_outputs({"y": y})
    group = plan(function).groups[y]
    assert [a.target.name for a in group.anchors] == ["integer_linear"]
    chain, _ = build_chain(group)
    assert chain.inputs[0].dtype == "int32"
    assert [i.kind for i in chain.inputs] == ["accumulator", "column", "column", "row", "column"]
    assert [s.op for s in chain.steps] == [
        "add",
        "cast",
        "mul",
        "mul",
        "add",
        "gelu_erf",
        "round",
        "saturate",
    ]


@pytest.mark.parametrize("biases", [(True, True, True), (True, False, True)])
def test_integer_projections_are_joined(biases):
    function, x = block()
    b = function.builder()
    scale = b.dynamic_scale(x)
    codes = b.quantize(x, scale, 128, dtype="uint8")
    q, k, v = (integer_layer(function, codes, scale, 16, bias) for bias in biases)
    y = b.attention(q, k, v, None, heads=2, kv_heads=2, scale=0.5)
    function.set_outputs({"y": y})
    start, multiplier, row, bias = plan(function).joined[y].feeds
    assert set(row) == {scale} and len({*start}) == len({*multiplier}) == 3
    # zeros are added where a layer has no bias
    assert [b is None for b in bias] == [not given for given in biases]


@pytest.mark.parametrize("shared", [True, False])
def test_projections_of_groups_are_joined_where_they_have_the_same_scales(shared):
    function, x = block()
    b = function.builder()
    scales = [b.dynamic_scale(x, group=16)] * 3 if shared else [b.dynamic_scale(x, group=16) for _ in "qkv"]
    codes = b.quantize(x, scales[0], 128, dtype="uint8", group=16)
    q, k, v = (
        b.grouped_integer_linear(codes, b.parameter("c", torch.ones(16, 16, dtype=torch.int8)), scale)
        for scale in scales
    )
    y = b.attention(q, k, v, None, heads=2, kv_heads=2, scale=0.5)
    function.set_outputs({"y": y})
    joined = plan(function).joined
    assert (joined[y].anchors == (q, k, v) and not joined[y].feeds) if shared else joined == {}


def test_projections_with_other_work_behind_them_stay_apart():
    function, x = block()
    b = function.builder()
    scale = b.dynamic_scale(x)
    codes = b.quantize(x, scale, 128, dtype="uint8")
    q, k, v = (integer_layer(function, codes, scale, 16) for _ in range(3))
    y = b.attention(b.relu(q), k, v, None, heads=2, kv_heads=2, scale=0.5)
    function.set_outputs({"y": y})
    assert plan(function).joined == {}


def fixed_codes(function: Function, x):
    """What quantize with one scale is made of."""
    b = function.builder()
    inverse, zero = b.parameter("s", torch.tensor(20.0)), b.parameter("z", torch.tensor(9.0))
    return b.saturate(b.add(b.round(b.mul(x, inverse)), zero), dtype="uint8")


@pytest.mark.parametrize("residual", [False, True])
def test_codes_of_a_norm_are_made_by_its_kernel(residual):
    function, x = block()
    b = function.builder()
    norm = b.layer_norm(x)
    codes = fixed_codes(function, norm)
    results = {"codes": codes} | ({"norm": norm} if residual else {})
    function.set_outputs(results)
    made = plan(function)
    assert not made.groups and made.tails[norm].kept is residual
    assert made.tails[norm].group.root is codes and codes in made.inner
    chain, feeds = build_chain(made.tails[norm].group, norm)
    assert [i.kind for i in chain.inputs] == ["accumulator", "scalar", "scalar"] and len(feeds) == 2


def test_an_epilogue_waits_for_no_value():
    """What is computed after the norm cannot be read by its kernel."""
    function, x = block()
    b = function.builder()
    norm = b.layer_norm(x)
    later = b.softmax(norm, dim=-1)
    function.set_outputs({"y": b.add(norm, later)})
    assert plan(function).tails == {}


def test_codes_per_token_are_made_with_their_scale():
    function, x = block()
    b = function.builder()
    norm, hidden = b.rms_norm(x), b.mul(b.silu(x), x)
    made = []
    for value in (norm, hidden, b.permute(x, dims=(0, 2, 1))):
        scale = b.dynamic_scale(value)
        made += [(scale, b.quantize(value, scale, 128, dtype="uint8"))]
    function.set_outputs({f"y{i}": n for i, pair in enumerate(made) for n in pair} | {"norm": norm})
    tails = plan(function).tails
    assert tails[norm].scale is made[0][0] and tails[norm].codes == (made[0][1],) and tails[norm].kept
    assert tails[made[1][0]].group.root is hidden and tails[made[2][0]].group is None
    assert {pair[1] for pair in made} <= plan(function).inner


def test_promotion_becomes_explicit_casts():
    function = Function("main")
    mask = function.add_input("mask", Value("int64", (B, T)))
    b = function.builder()
    y = b.mul(b.sub(1.0, mask), -1e9)
    function.set_outputs({"y": y})
    (group,) = plan(function).groups.values()
    chain, _ = build_chain(group)
    assert [(s.op, s.dtype) for s in chain.steps] == [("cast", "float32"), ("sub", None), ("mul", None)]
    assert chain.steps[1].args == (Const(1.0), 1)


def test_products_of_bf16_read_the_narrow_values():
    function, x = block()
    b = function.builder()
    short = b.cast(b.layer_norm(x), dtype="bfloat16")
    wide = b.cast(short, dtype="float32")
    stored = b.parameter("w", torch.ones(32, 16, dtype=torch.bfloat16))
    y = b.cast(b.gelu(b.linear(wide, b.cast(stored, dtype="float32"))), dtype="bfloat16")
    function.set_outputs({"y": y})
    made = plan(function)
    (group,) = made.groups.values()
    assert left_matrix(group.anchors[0]) is short and stored_weight(group.anchors[0]) is stored
    assert wide in made.inner and [s.op for s in build_chain(group)[0].steps] == ["gelu_erf", "cast"]
    (norm,) = made.tails
    assert made.tails[norm].group.root is short and not made.tails[norm].kept


@pytest.mark.parametrize("multiplied", [True, False])
def test_products_of_fp16_read_narrow_values_where_the_target_multiplies_them(multiplied):
    """Elsewhere they read the rounded values in f32, but the stored weight in any case."""
    function, x = block()
    b = function.builder()
    short = b.cast(x, dtype="float16")
    wide = b.cast(short, dtype="float32")
    stored = b.parameter("w", torch.ones(16, 16, dtype=torch.float16))
    read = b.cast(stored, dtype="float32")
    y = b.linear(wide, read)
    function.set_outputs({"y": y})
    made = plan(function, BF16 | {"float16"} if multiplied else BF16)
    assert made.left_matrix(y) is (short if multiplied else wide) and stored_weight(y) is stored
    assert read in made.inner and made.groups[y].anchors == [y]
    assert (wide in made.inner) == multiplied and (wide in made.groups) != multiplied


def test_layers_whose_weights_differ_in_dtype_are_not_joined():
    function, x = block()
    b = function.builder()
    narrow = [b.parameter(f"w{i}", torch.ones(16, 16, dtype=torch.float16)) for i in range(2)]
    weights = [b.cast(n, dtype="float32") for n in narrow] + [b.parameter("wide", torch.ones(16, 16))]
    y = b.attention(*(b.linear(x, w) for w in weights), heads=2, kv_heads=2, scale=0.3)
    function.set_outputs({"y": y})
    made = plan(function)
    assert made.joined == {} and {stored_weight(g.anchors[0]) for g in made.groups.values()} >= {*narrow}


def test_a_widened_value_that_others_read_is_computed():
    function, x = block()
    b = function.builder()
    wide = b.cast(b.cast(x, dtype="bfloat16"), dtype="float32")
    stored = b.cast(b.parameter("w", torch.ones(16, 16, dtype=torch.bfloat16)), dtype="float32")
    function.set_outputs({"y": b.linear(wide, stored), "z": b.exp(wide)})
    assert wide not in plan(function).inner or wide in {
        m for g in plan(function).groups.values() for m in g.members
    }


@pytest.mark.parametrize("other", [None, "codes", "scales"])
def test_rows_of_codes_are_decoded_where_they_are_looked_up_unless_something_else_reads_them(other):
    function = Function("main")
    ids = function.add_input("ids", Value("int64", (B, T)))
    b = function.builder()
    codes = b.embedding(ids, b.parameter("c", torch.zeros(9, 4, dtype=torch.int8)))
    scales = b.index_select(b.parameter("s", torch.ones(9, 1)), ids, dim=0)
    rows = b.dequantize(codes, scales)
    function.set_outputs({"y": rows} | ({"z": codes if other == "codes" else scales} if other else {}))
    assert is_decoded_rows(rows) == (other is None)
    assert plan(function).inner == ({codes, scales} if other is None else set())
