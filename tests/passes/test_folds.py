"""The exact folds: what they do, on what they keep their hands off, and that planted structure goes."""

from __future__ import annotations

import pytest
import torch

from tersor.ir import Program
from tersor.passes import Context, Pipeline, recipes
from tersor.passes.fold.attention_scale import FoldAttentionScale
from tersor.passes.fold.key_bias import FoldKeyBias
from tersor.passes.fold.norm_beta import FoldNormBeta
from tersor.passes.fold.norm_gamma import FoldNormGamma
from tersor.passes.fold.value_bias import FoldValueBias
from tersor.passes.fold.zero_heads import FoldZeroHeads
from tersor.passes.fold.zero_neurons import FoldZeroNeurons
from tersor.passes.numerics import outputs, relative_error, small_inputs
from tests.passes.check_pass import apply, check_pass
from tests.passes.programs import BATCH, LENGTH, Transformer, Weights, program, shapes

WIDTH = 16


def reasons(pass_, made: Program) -> dict[str, str]:
    """Site -> why it was left alone."""
    after, report = Pipeline([pass_]).run(made)
    return {skip.site: skip.reason for skip in report.steps[0].skips}


# -- norms


def normed(
    gamma: bool, beta: bool, *, folded: str = "", linears: int = 2, kind: str = "layer_norm"
) -> Program:
    """norm(x) into linear layers; ``folded`` ("beta", "gamma") writes the expected result instead."""

    def emit(build, x, mask):
        make = Weights(build)
        scale, shift = make.tensor(WIDTH), make.tensor(WIDTH)
        operands = [build.parameter("g", scale) if gamma and folded != "gamma" else None]
        if beta and not folded:
            operands.append(build.parameter("b", shift))
        norm = getattr(build, kind)(x, *operands, site="norm")
        results = {}
        for i in range(linears):
            weight, bias = make.tensor(8, WIDTH), make.tensor(8) if i else torch.zeros(8)
            shifted = bias + weight @ shift if folded == "beta" else bias
            weight = weight * scale if folded == "gamma" else weight
            given = build.parameter(f"b{i}", shifted) if i or folded == "beta" else None
            results[f"y{i}"] = build.linear(norm, build.parameter(f"w{i}", weight), given, site=f"linear.{i}")
        return results

    return program(emit)


def test_norm_beta_moves_into_every_linear_layer_also_one_without_bias():
    check_pass(
        FoldNormBeta(),
        normed(gamma=True, beta=True),
        normed(gamma=True, beta=True, folded="beta"),
        unmatched=Transformer(post_norm=True).build(),
    )


@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
def test_norm_gamma_moves_into_the_columns(kind):
    check_pass(
        FoldNormGamma(),
        normed(gamma=True, beta=False, kind=kind),
        normed(gamma=True, beta=False, kind=kind, folded="gamma"),
        unmatched=Transformer(post_norm=True).build(),
    )


def test_gamma_waits_for_beta():
    made = Transformer(layers=1).build()
    assert "fold.norm_beta" in reasons(FoldNormGamma(), made)["block.0.attention.norm"]
    after, report = Pipeline(["fold.norm_beta", "fold.norm_gamma"]).run(made)
    assert len(report.step("fold.norm_gamma").changes) == 2
    assert not shapes(after, "norm")


def test_a_norm_that_the_residual_stream_reads_keeps_its_beta():
    found = reasons(FoldNormBeta(), Transformer(layers=2, post_norm=True).build())
    assert found["block.0.attention.norm"].startswith("it is also read by")
    assert found["block.1.ffn.norm"] == "it is a result of the program"


def test_beta_does_not_become_a_larger_bias():
    def emit(build, x, mask):
        make = Weights(build)
        norm = build.layer_norm(x, make("g", WIDTH), make("b", WIDTH), site="norm")
        return {"logits": make.linear(norm, "head", WIDTH + 1, WIDTH, bias=False)}

    assert reasons(FoldNormBeta(), program(emit)) == {
        "norm": "the linear layers have no bias, and new ones would be larger than its beta"
    }


def test_a_norm_that_is_used_as_a_weight_keeps_its_beta():
    def emit(build, x, mask):
        make = Weights(build)
        norm = build.layer_norm(make("rows", 8, WIDTH), make("g", WIDTH), make("b", WIDTH), site="norm")
        return {"y": build.linear(x, norm, site="linear")}

    assert reasons(FoldNormBeta(), program(emit)) == {"norm": "it is also read by linear (linear)"}


def test_gamma_does_not_untie_an_embedding():
    def emit(build, x, mask):
        make = Weights(build)
        table = make("table", 8, WIDTH)
        ids = build.argmax(x, dim=-1)
        rows = build.embedding(build.minimum(ids, 7), table)
        return {
            "y": build.linear(
                build.rms_norm(build.add(rows, x), make("g", WIDTH), site="norm"), table, site="head"
            )
        }

    assert "also read by" in reasons(FoldNormGamma(), program(emit))["norm"]


# -- attention


def attention(folded: str = "", *, scale: float = 0.25) -> Program:
    """Two heads of queries on one of keys; ``folded`` ("key", "value", "scale") writes the expected result instead."""

    def emit(build, x, mask):
        make = Weights(build)
        q, k, v, o = (
            make.tensor(8, WIDTH),
            make.tensor(4, WIDTH),
            make.tensor(4, WIDTH),
            make.tensor(WIDTH, 8),
        )
        bq, bk, bv, bo = make.tensor(8), make.tensor(4), make.tensor(4), make.tensor(WIDTH)
        factor = scale if folded == "scale" else 1.0
        moved = o @ torch.cat((bv, bv)) if folded == "value" else 0.0

        def linear(x, site, weight, bias):
            given = build.parameter(f"{site}.bias", bias) if bias is not None else None
            return build.linear(x, build.parameter(f"{site}.weight", weight), given, site=site)

        queries = linear(x, "q", q * factor, bq * factor)
        keys = linear(x, "k", k, None if folded == "key" else bk)
        values = linear(x, "v", v, None if folded == "value" else bv)
        left = 1.0 if folded == "scale" else scale
        attended = build.attention(
            queries, keys, values, mask, heads=2, kv_heads=1, scale=left, site="attention"
        )
        return {"y": linear(attended, "o", o, bo + moved)}

    return program(emit, mask="padding")


def test_key_bias_is_dropped():
    check_pass(FoldKeyBias(), attention(), attention("key"), unmatched=Transformer(rotary=True).build())


def test_a_rotated_key_keeps_its_bias():
    found = reasons(FoldKeyBias(), Transformer(layers=1, rotary=True).build())
    assert found == {
        "block.0.attention": "between the key projection and the attention lies rotary_embedding"
    }


def test_a_key_that_is_also_a_result_keeps_its_bias():
    def emit(build, x, mask):
        make = Weights(build)
        q, k, v = (make.linear(x, role, 16, WIDTH) for role in "qkv")
        attended = build.attention(q, k, v, heads=2, kv_heads=2, scale=1.0, site="attention")
        return {"y": make.linear(attended, "o", WIDTH, 16), "keys": k}

    made = program(emit)
    assert reasons(FoldKeyBias(), made) == {"attention": "the key is also read by the program's output"}
    assert reasons(FoldZeroHeads(), made) == {"attention": "the key is also read by the program's output"}


def test_value_bias_moves_behind_the_attention_for_each_head_of_its_group():
    check_pass(FoldValueBias(), attention(), attention("value"), unmatched=Transformer(bias=False).build())


@pytest.mark.parametrize(
    ("mask", "causal", "moves"),
    [
        (None, False, True),
        ("padding", False, True),
        (None, True, True),
        ("padding", True, False),
        ("queries", False, False),
    ],
)
def test_value_bias_moves_only_where_every_query_sees_a_key(mask, causal, moves):
    made = Transformer(layers=1, mask=mask, causal=causal).build()
    assert (apply(FoldValueBias(), made) is not made) == moves


def test_a_padding_mask_may_be_expanded_to_all_queries():
    def emit(build, x, mask):
        make = Weights(build)
        q, k, v = (make.linear(x, role, 16, WIDTH) for role in "qkv")
        wide = build.expand(mask, shape=(BATCH, 1, LENGTH, LENGTH))
        attended = build.attention(q, k, v, wide, heads=2, kv_heads=2, scale=1.0, site="attention")
        return {"y": make.linear(attended, "o", WIDTH, 16)}

    made = program(emit, mask="padding")
    assert apply(FoldValueBias(), made) is not made


def test_a_query_that_sees_no_key_shows_why_value_bias_stays():
    made = Transformer(layers=1, mask="queries").build()
    inputs = {"x": torch.randn(1, 3, WIDTH), "mask": torch.ones(1, 1, 3, 3, dtype=torch.bool)}
    inputs["mask"][0, 0, 1] = False
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tersor.passes.fold.value_bias.every_query_sees_a_key", lambda attention: True)
        forced, _ = Pipeline([FoldValueBias()]).run(made, Context(numerics="never"))
    assert relative_error(outputs(made, {"main": inputs}), outputs(forced, {"main": inputs})) > 1e-3


def test_scale_moves_into_the_queries():
    check_pass(FoldAttentionScale(), attention(), attention("scale"), unmatched=attention(scale=1.0))


def test_scale_passes_a_rotary_embedding_but_no_norm():
    turned = apply(FoldAttentionScale(), Transformer(layers=1, rotary=True).build())
    assert turned.main.calls("attention")[0].kwargs["scale"] == 1.0
    assert (
        "norm"
        in reasons(FoldAttentionScale(), Transformer(layers=1, head_norm=True).build())["block.0.attention"]
    )


# -- zero neurons and heads


PLANTED = {
    "dead_heads": ((1,), (0, 2, 3)),
    "dead_rows": ((3, 9), (0,)),
    "dead_columns": ((5,), (0, 1, 2, 23)),
}


@pytest.mark.parametrize(
    "style", [{}, {"post_norm": True}, {"rms": True, "bias": False, "gated": True}, {"rotary": True}]
)
def test_planted_zero_heads_go_a_different_number_in_each_layer(style):
    made = Transformer(**PLANTED, **style).build()
    after = check_pass(FoldZeroHeads(), made, None, unmatched=Transformer(**style).build())
    assert [a.kwargs["heads"] for a in after.main.calls("attention")] == [3, 1]
    for role in ("query", "key", "value"):
        assert shapes(after, f"0.attention.{role}.weight") == {f"block.0.attention.{role}.weight": (12, 16)}
        assert shapes(after, f"1.attention.{role}.weight") == {f"block.1.attention.{role}.weight": (4, 16)}
    assert shapes(after, "0.attention.output.weight") == {"block.0.attention.output.weight": (16, 12)}


@pytest.mark.parametrize("style", [{}, {"post_norm": True}, {"rms": True, "bias": False, "gated": True}])
def test_planted_zero_neurons_go_a_different_number_in_each_layer(style):
    made = Transformer(**PLANTED, **style).build()
    after = check_pass(FoldZeroNeurons(), made, None, unmatched=Transformer(**style).build())
    # rows {3, 9} and column {5}; row {0} and columns {0, 1, 2, 23}
    assert shapes(after, "0.ffn.up.weight") == {"block.0.ffn.up.weight": (21, 16)}
    assert shapes(after, "1.ffn.up.weight") == {"block.1.ffn.up.weight": (20, 16)}
    assert shapes(after, "1.ffn.down.weight") == {"block.1.ffn.down.weight": (16, 20)}


def test_the_fp32_recipe_shrinks_a_planted_model_and_keeps_its_results():
    style = {
        "heads": 8,
        "kv_heads": 4,
        "width": 32,
        "rms": True,
        "gated": True,
        "bias": False,
        "rotary": True,
    }
    groups = ((2, 3), (0, 1, 4, 5, 6), (1, 3, 5, 7))
    made = Transformer(
        layers=3, causal=True, **style, dead_heads=groups, dead_columns=((0,), (1, 2), ())
    ).build()
    after, report = recipes.get("fp32").run(made, Context(numerics="always"))
    kept = [(a.kwargs["heads"], a.kwargs["kv_heads"]) for a in after.main.calls("attention")]
    # layer 0 loses group 1; layer 1 groups 0 and 2, while head 6 stays beside 7; layer 2 one head of every group
    assert kept == [(6, 3), (4, 2), (4, 4)]
    assert after.parameters.bytes < made.parameters.bytes
    assert report.steps[-1].after.macs < report.steps[0].before.macs
    inputs = small_inputs(made, seed=3)
    assert relative_error(outputs(made, inputs), outputs(after, inputs)) <= 1e-6
    assert {s.reason for s in report.step("fold.zero_heads").skips} == {
        "heads 6 are zero but stay: their groups would become unequal"
    }


def test_a_head_whose_values_are_zero_goes_too():
    made = Transformer(layers=1, bias=False).build()
    name = "block.0.attention.value.weight"
    weight = made.parameters[name].tensor.clone()
    weight[4:8] = 0
    made.parameters[name] = weight
    assert apply(FoldZeroHeads(), made).main.calls("attention")[0].kwargs["heads"] == 3


def test_a_head_whose_values_are_constant_but_not_zero_stays():
    made = Transformer(layers=1).build()
    name = "block.0.attention.value.weight"
    weight = made.parameters[name].tensor.clone()
    weight[4:8] = 0
    made.parameters[name] = weight
    assert apply(FoldZeroHeads(), made) is made
    # once its bias has moved on, the head is zero
    after, _ = Pipeline([FoldValueBias(), FoldZeroHeads()]).run(made)
    assert after.main.calls("attention")[0].kwargs["heads"] == 3


def test_keys_that_are_also_values_keep_their_bias():
    def emit(build, x, mask):
        make = Weights(build)
        q, kv = (make.linear(x, role, 16, WIDTH) for role in ("q", "kv"))
        attended = build.attention(q, kv, kv, heads=2, kv_heads=2, scale=1.0, site="attention")
        return {"y": make.linear(attended, "o", WIDTH, 16)}

    made = program(emit)
    for pass_, role in ((FoldKeyBias(), "key"), (FoldValueBias(), "value"), (FoldZeroHeads(), "key")):
        assert reasons(pass_, made) == {"attention": f"the {role} has a second role in attention"}


def test_heads_go_through_a_norm_per_head():
    made = Transformer(layers=1, head_norm=True, rotary=True, dead_heads=((0, 3),)).build()
    after = apply(FoldZeroHeads(), made)
    assert after.main.calls("attention")[0].kwargs["heads"] == 2
    assert {r.kwargs["heads"] for r in after.main.calls("rotary_embedding")} == {2}


def test_heads_with_their_own_masks_stay():
    def emit(build, x, mask):
        make = Weights(build)
        q, k, v = (make.linear(x, role, 16, WIDTH) for role in "qkv")
        slopes = build.mul(build.cast(mask, dtype="float32"), make("slopes", 1, 2, 1, 1))
        attended = build.attention(q, k, v, slopes, heads=2, kv_heads=2, scale=1.0, site="attention")
        output = make.tensor(WIDTH, 16)
        output[:, :8] = 0
        return {"y": build.linear(attended, build.parameter("o", output), site="o")}

    assert reasons(FoldZeroHeads(), program(emit, mask="padding")) == {
        "attention": "its mask differs from head to head"
    }


def test_all_dead_keeps_one_head_and_one_neuron():
    style = {"layers": 1, "dead_heads": (tuple(range(4)),), "dead_columns": (tuple(range(24)),)}
    after, report = Pipeline([FoldZeroHeads(), FoldZeroNeurons()]).run(Transformer(**style).build())
    assert after.main.calls("attention")[0].kwargs["heads"] == 1
    assert shapes(after, "ffn.up.weight") == {"block.0.ffn.up.weight": (1, 16)}
    again, _ = Pipeline([FoldZeroHeads(), FoldZeroNeurons()]).run(after)
    assert again is after


def test_a_constant_neuron_moves_into_the_next_bias_through_any_elementwise_chain():
    def emit(build, x, mask):
        make = Weights(build)
        rows = make.tensor(6, WIDTH)
        rows[2] = 0
        hidden = build.linear(x, build.parameter("w", rows), make("b", 6), site="up")
        hidden = build.add(build.mul(build.gelu_tanh(hidden), make("scales", 1, 1, 6)), 0.5)
        return {"y": make.linear(hidden, "down", WIDTH, 6, bias=False)}

    after = apply(FoldZeroNeurons(), program(emit))
    assert shapes(after) == {
        "w": (5, 16), "b": (5,), "scales": (1, 1, 5), "down.weight": (16, 5), "down.bias": (16,),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("role", "bias", "goes"),
    [("up", 0.0, True), ("up", 1.0, False), ("gate", 0.0, True), ("gate", 1.0, False), ("both", 1.0, True)],
)
def test_a_gated_neuron_goes_when_a_factor_is_zero_or_both_are_constant(role, bias, goes):
    made = Transformer(layers=1, gated=True).build()
    for name in ("up", "gate") if role == "both" else (role,):
        for part, value in (("weight", 0.0), ("bias", bias)):
            tensor = made.parameters[f"block.0.ffn.{name}.{part}"].tensor.clone()
            tensor[4] = value
            made.parameters[f"block.0.ffn.{name}.{part}"] = tensor
    assert (apply(FoldZeroNeurons(), made) is not made) == goes


def test_a_neuron_that_is_constant_but_not_finite_stays():
    def emit(build, x, mask):
        make = Weights(build)
        rows = make.tensor(6, WIDTH)
        rows[2] = 0
        hidden = build.log(build.linear(x, build.parameter("w", rows), site="up"))
        return {"y": make.linear(hidden, "down", WIDTH, 6)}

    assert reasons(FoldZeroNeurons(), program(emit)) == {"down": "none of its neurons is zero"}


def test_layers_in_a_chain_are_all_cleaned_in_one_run():
    def emit(build, x, mask):
        make = Weights(build)
        for i in range(3):
            rows = make.tensor(12, WIDTH if i == 0 else 12)
            rows[i] = 0
            x = build.relu(build.linear(x, build.parameter(f"w{i}", rows), site=f"layer.{i}"))
        return {"y": make.linear(x, "last", WIDTH, 12)}

    after = apply(FoldZeroNeurons(), program(emit))
    assert shapes(after, "w") | shapes(after, "last.w") == {
        "w0": (11, 16), "w1": (11, 11), "w2": (11, 11), "last.weight": (16, 11),
    }  # fmt: skip
    assert apply(FoldZeroNeurons(), after) is after


def test_neurons_that_something_else_reads_stay():
    def emit(build, x, mask):
        make = Weights(build)
        rows = make.tensor(6, WIDTH)
        rows[2] = 0
        hidden = build.gelu(build.linear(x, build.parameter("w", rows), site="up"))
        return {"y": make.linear(hidden, "down", WIDTH, 6), "hidden": hidden}

    assert reasons(FoldZeroNeurons(), program(emit)) == {
        "down": "its input is also read by the program's output"
    }


def test_neurons_mixed_with_a_residual_stay():
    def emit(build, x, mask):
        make = Weights(build)
        hidden = build.add(make.linear(x, "up", WIDTH, WIDTH), x)
        return {"y": make.linear(hidden, "down", WIDTH, WIDTH)}

    assert "mixed with" in reasons(FoldZeroNeurons(), program(emit))["down"]


# -- ties and choices


def tied_layers(*, same: bool) -> Program:
    """Two feed-forward layers with one set of weights; the second lies behind another norm where ``same`` is false."""

    def emit(build, x, mask):
        make = Weights(build)
        rows, columns = make.tensor(6, WIDTH), make.tensor(WIDTH, 6)
        rows[2] = 0
        w1, w2 = build.parameter("w1", rows), build.parameter("w2", columns)
        for i in range(2):
            hidden = build.relu(build.linear(x, w1, site=f"up.{i}"))
            if i == 1 and not same:
                hidden = build.add(hidden, build.slice(x, dim=2, start=0, end=6))
            x = build.add(x, build.linear(hidden, w2, site=f"down.{i}"))
        return {"y": x}

    return program(emit)


def test_tied_layers_shrink_together_and_stay_tied():
    after = apply(FoldZeroNeurons(), tied_layers(same=True))
    assert shapes(after) == {"w1": (5, 16), "w2": (16, 5)}


def test_weights_that_are_the_same_memory_under_two_names_stay_tied():
    made = tied_layers(same=True)
    for name, index in (("w1", 1), ("w2", 1)):
        made.parameters[f"{name}.other"] = made.parameters[name]
        second = [n for n in made.main.calls("linear") if n.args[index].target == name][1]
        second.update_arg(index, made.main.builder(before=second).read(f"{name}.other"))
    after = apply(FoldZeroNeurons(), made)
    assert shapes(after) == {"w1": (5, 16), "w2": (16, 5), "w1.other": (5, 16), "w2.other": (16, 5)}
    assert after.parameters["w1"].storage == after.parameters["w1.other"].storage


def test_a_tied_matrix_that_another_place_needs_whole_stays():
    made = tied_layers(same=False)
    found = reasons(FoldZeroNeurons(), made)
    assert found["down.0"].endswith("where it would not change in the same way")


def test_tied_weights_of_two_functions_shrink_together():
    made = Transformer(layers=1, dead_heads=((1,),), dead_columns=((4,),)).build()
    other = made.main.copy(made.parameters)
    other.name = "decode"
    made.functions["decode"] = other
    after = apply(FoldZeroHeads(), apply(FoldZeroNeurons(), made))
    assert {f.calls("attention")[0].kwargs["heads"] for f in after.functions.values()} == {3}
    assert len(after.parameters) == len(made.parameters)


@pytest.mark.parametrize("cls", [FoldZeroHeads, FoldZeroNeurons, FoldNormBeta, FoldKeyBias, FoldValueBias])
def test_only_and_skip_choose_places(cls):
    made = Transformer(**PLANTED).build()
    for choice in (cls(only="block.1.*"), cls(skip="block.0.*")):
        _, report = Pipeline([choice]).run(made)
        assert report.steps[0].changes
        assert all(change.site.startswith("block.1.") for change in report.steps[0].changes)


def test_a_neighbour_named_in_skip_stays_as_it_is():
    made = Transformer(layers=1).build()
    after, report = Pipeline([FoldNormBeta(skip="*.key")]).run(made)
    assert [s.reason for s in report.steps[0].skips] == [
        "it would change block.0.attention.key, named in skip="
    ]
    assert [c.site for c in report.steps[0].changes] == ["block.0.ffn.norm"]


def test_the_folds_of_the_recipe_leave_nothing_for_a_second_run():
    for style in ({}, {"gated": True, "rms": True, "bias": False}, {"post_norm": True}):
        made = Transformer(**PLANTED, **style).build()
        once, _ = recipes.get("fp32").run(made)
        twice, report = recipes.get("fp32").run(once)
        assert twice is once, [s.name for s in report.steps if s.modified]


def test_a_negative_control_a_trained_looking_model_keeps_its_shapes():
    made = Transformer(layers=2).build()
    after, _ = recipes.get("fp32").run(made)
    assert {n: s for n, s in shapes(after).items() if n.endswith("weight") and len(s) == 2} == {
        n: s for n, s in shapes(made).items() if n.endswith("weight") and len(s) == 2
    }


def test_a_folded_program_can_be_fixed_to_sizes():
    """As whoever measures it does."""
    after = apply(FoldNormBeta(), Transformer().build())
    fixed = after.specialize({"batch": 2, "length": 8})
    assert not fixed.main.dims and [n.meta["value"].shape for n in fixed.main.results] == [(2, 8, 16)]
