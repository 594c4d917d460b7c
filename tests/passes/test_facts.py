"""Facts are computed from the program."""

from __future__ import annotations

import pytest
import torch

from tersor.errors import PipelineError
from tersor.ir import Program, Value
from tersor.passes import Pipeline, facts
from tersor.passes.fold.key_bias import FoldKeyBias
from tests.passes.programs import Transformer, Weights, program


def test_static_means_that_no_dimension_varies():
    assert not facts.holds("static", Transformer(layers=1).build())
    fixed = Program()
    function = fixed.add_function("main")
    function.set_outputs({"y": function.add_input("x", Value("float32", (2, 3)))})
    assert facts.holds("static", fixed)


def test_quantized_means_integer_weights_whatever_lies_between():
    def emit(build, x, mask):
        codes = build.parameter("codes", torch.ones(8, 16, dtype=torch.int8))
        weight = build.mul(build.cast(codes, dtype="float32"), build.parameter("scale", torch.ones(8, 1)))
        make = Weights(build)
        return {"y": build.add(build.linear(x, weight, site="int"), make.linear(x, "float", 8, 16))}

    assert facts.holds_at("quantized", program(emit)) == {("main", "int")}


def test_masked_means_two_of_four():
    made = Transformer(layers=1).build()
    assert not facts.holds_at("masked", made)
    for name, kept in (("query", 2), ("key", 3)):
        weight = made.parameters[f"block.0.attention.{name}.weight"].tensor
        pattern = torch.arange(16) % 4 < kept
        made.parameters[f"block.0.attention.{name}.weight"] = torch.where(pattern, weight, 0.0)
    assert facts.holds_at("masked", made) == {("main", "block.0.attention.query")}


def test_factorized_means_two_thin_layers_for_one():
    def emit(build, x, mask):
        make = Weights(build)
        thin = make.linear(make.linear(x, "a", 4, 16, bias=False), "b", 16, 4)
        wide = make.linear(make.linear(x, "c", 12, 16, bias=False), "d", 16, 12)
        return {"y": build.add(thin, wide)}

    assert facts.holds_at("factorized", program(emit)) == {("main", "b")}


def test_the_table_is_open():
    @facts.fact("toy.small", operations=("linear",))
    def small(function, node):
        """The weights are small."""
        return bool(function.parameter(node.args[1]).abs().max() < 10)

    try:
        made = Transformer(layers=1).build()
        made.parameters["block.0.ffn.up.weight"] = made.parameters["block.0.ffn.up.weight"].tensor * 100
        places = facts.holds_at("toy.small", made)
        assert ("main", "block.0.ffn.up") not in places and ("main", "block.0.attention.key") in places
        with pytest.raises(PipelineError, match="declared twice"):
            facts.fact("toy.small", operations=("linear",))(small)
    finally:
        del facts._table["toy.small"]


def test_a_fact_says_what_it_means():
    with pytest.raises(PipelineError, match="says nothing"):
        facts.fact("toy.mute", operations=("linear",))(lambda function, node: True)


def test_an_unknown_fact_suggests_the_nearest():
    with pytest.raises(PipelineError, match="no fact 'qantized'") as raised:
        facts.get("qantized")
    assert raised.value.fix == "did you mean 'quantized'?"


def test_computed_facts_cannot_be_recorded():
    with pytest.raises(PipelineError, match="it cannot be recorded"):
        facts.Records().put("static", Program())


def test_facts_count_at_the_selected_sites_only():
    made = Transformer(layers=2).build()
    weight = made.parameters["block.1.ffn.up.weight"].tensor
    made.parameters["block.1.ffn.up.weight"] = torch.where(torch.arange(16) % 4 < 2, weight, 0.0)

    class Dense(FoldKeyBias):
        """Wants no holes."""

        forbids = {"masked"}

    assert not facts.unmet(Dense(), made)  # such sites are left out
    assert facts.barred(Dense(), made) == {"block.1.ffn.up": "masked"}
    assert not facts.barred(Dense(skip="block.1.ffn.up"), made)
    assert not facts.barred(Dense(only="block.0.*"), made)


def test_what_is_masked_stays_so_in_codes_and_in_bf16():
    made = Transformer(layers=1, mask=None).build()
    weight = made.parameters["block.0.ffn.up.weight"].tensor.clone()
    weight.view(-1, 4)[:, 1:3] = 0
    made.parameters["block.0.ffn.up.weight"] = weight
    held = {("main", "block.0.ffn.up")}
    for passes in (
        ["quantize.bf16"],
        ["quantize.rtn"],
        ["quantize.rtn", "quantize.dynamic", "quantize.integers"],
    ):
        after, _ = Pipeline(passes).run(made)
        assert facts.holds_at("masked", after) == held
