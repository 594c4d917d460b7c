"""Pipelines as lists, and as recipes."""

from __future__ import annotations

import pytest
import torch

from tersor.errors import InputError, PipelineError
from tersor.passes import Budget, Pass, PassResult, Pipeline, Stage, recipes
from tersor.passes.fold.key_bias import FoldKeyBias
from tersor.passes.fold.norm_beta import FoldNormBeta
from tersor.passes.fold.norm_gamma import FoldNormGamma
from tests.passes.programs import Transformer


def names(pipeline: Pipeline) -> list[str]:
    return [step.name for step in pipeline]


@pytest.fixture
def pipeline() -> Pipeline:
    return Pipeline([FoldNormBeta(), Stage("careful", (FoldNormGamma(), FoldKeyBias())), "cleanup.dead_code"])


def test_the_order_of_the_user_is_kept(pipeline):
    assert names(pipeline) == ["fold.norm_beta", "careful", "cleanup.dead_code"]
    assert [p.name for p in pipeline.passes] == [
        "fold.norm_beta",
        "fold.norm_gamma",
        "fold.key_bias",
        "cleanup.dead_code",
    ]
    assert len(pipeline) == 3


def test_insert_by_name(pipeline):
    pipeline.insert("fold.value_bias", after="fold.norm_beta").insert(
        "fold.zero_heads", before="fold.norm_beta"
    )
    assert names(pipeline) == [
        "fold.zero_heads",
        "fold.norm_beta",
        "fold.value_bias",
        "careful",
        "cleanup.dead_code",
    ]
    pipeline.insert(FoldKeyBias(skip="a"), after="careful")
    pipeline.insert("fold.attention_scale", before="fold.norm_gamma")
    assert [p.name for p in pipeline.steps[3].passes] == [
        "fold.attention_scale",
        "fold.norm_gamma",
        "fold.key_bias",
    ]


def test_remove_and_replace(pipeline):
    pipeline.replace("cleanup.dead_code", "cleanup.constant_folding").replace(
        "fold.key_bias", FoldKeyBias(skip="a")
    )
    pipeline.remove("fold.norm_gamma")
    assert names(pipeline) == ["fold.norm_beta", "careful", "cleanup.constant_folding"]
    assert pipeline.steps[1].passes == (FoldKeyBias(skip="a"),)
    pipeline.remove("fold.key_bias")
    assert names(pipeline) == ["fold.norm_beta", "cleanup.constant_folding"]


def test_names_that_are_not_there_or_not_unique(pipeline):
    with pytest.raises(PipelineError, match="no 'fold.norm_betta' in the pipeline") as raised:
        pipeline.remove("fold.norm_betta")
    assert raised.value.fix == "did you mean 'fold.norm_beta'?"
    with pytest.raises(PipelineError, match="one of after= and before="):
        pipeline.insert("fold.value_bias")
    pipeline.insert("cleanup.dead_code", before="careful")
    with pytest.raises(PipelineError, match="is in the pipeline 2 times"):
        pipeline.remove("cleanup.dead_code")
    with pytest.raises(PipelineError, match="cannot go into stage"):
        pipeline.insert(Stage("inner", ("fold.value_bias",)), after="fold.key_bias")


def test_plain_data_round_trip(pipeline):
    pipeline.steps[1] = Stage("careful", (FoldKeyBias(only="block.*"),), Budget(min_cosine=0.9), "warn")
    again = recipes.from_config(pipeline.config())
    assert again == pipeline and again.name == pipeline.name
    assert again.config() == pipeline.config()


def test_named_recipes():
    assert "fp32" in recipes.names() and recipes.describe("fp32")
    for name in recipes.names():
        recipe = recipes.get(name)
        assert recipe.name == name
        recipe.check()
        assert recipe.arrange() == recipes.get(name), "the named recipes are in the canonical order"
    with pytest.raises(PipelineError, match="no recipe 'fp23'") as raised:
        recipes.get("fp23")
    assert raised.value.fix == "did you mean 'fp32'?"


RECIPE = """
[[steps]]
pass = "fold.norm_beta"
skip = ["*.head"]

[[steps]]
stage = "careful"
budget = { min_cosine = 0.99 }
on_fail = "warn"
passes = ["fold.norm_gamma", { pass = "fold.key_bias", only = ["block.*"] }]
"""


def test_a_recipe_from_a_file(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(RECIPE)
    recipe = recipes.get(path)
    assert recipe.name == "mine"
    assert recipe.steps == [
        FoldNormBeta(skip=("*.head",)),
        Stage("careful", (FoldNormGamma(), FoldKeyBias(only=("block.*",))), Budget(min_cosine=0.99), "warn"),
    ]
    recipes.get(str(path)).explain()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps = [", "cannot be read"),
        ("step = []", "a recipe has no step"),
        ("steps = 3", "a list of steps"),
        ("[[steps]]\npass = 'fold.norm_bet'", "no pass 'fold.norm_bet'"),
        ("[[steps]]\npass = 'fold.norm_beta'\nskp = 'a'", "has no option 'skp'"),
        ("[[steps]]\nname = 'fold.norm_beta'", "is no pass"),
        ("[[steps]]\nstage = 's'\nbudgt = {}\npasses = ['fold.norm_beta']", "stage 's' has no budgt"),
        (
            "[[steps]]\nstage = 's'\nbudget = {cosine = 1}\npasses = ['fold.norm_beta']",
            "a budget has no cosine",
        ),
        ("[[steps]]\nstage = 's'\nbudget = {min_cosine = 'x'}\npasses = ['fold.norm_beta']", "min_cosine"),
        ("[[steps]]\nstage = 's'", "has no passes"),
    ],
)
def test_a_wrong_recipe_file_is_one_clear_error(tmp_path, text, message):
    path = tmp_path / "wrong.toml"
    path.write_text(text)
    with pytest.raises(PipelineError, match=message) as raised:
        recipes.get(path)
    assert "wrong.toml" in str(raised.value)


def test_a_recipe_file_that_is_not_there():
    with pytest.raises(PipelineError, match="cannot be read"):
        recipes.get("missing.toml")


def test_an_empty_pipeline_does_nothing():
    made = Transformer(layers=1).build()
    after, report = Pipeline([]).run(made)
    assert after is made and not report.steps


def test_a_model_is_no_program():
    with pytest.raises(InputError, match="not on a Linear") as raised:
        Pipeline([]).run(torch.nn.Linear(2, 2))
    assert "tersor.capture" in raised.value.fix


def test_a_recipe_without_data_is_named_only_where_it_does_the_same_work():
    class Looks(Pass):
        """Measures something of its own."""

        calibrated = True

        def run(self, program, context):
            return PassResult()

    with pytest.raises(PipelineError, match="needs calibration data") as raised:
        Pipeline([Looks()]).check_data(False)
    assert raised.value.fix == "give calibration=batches (--calibration FOLDER)"
