"""Data and models as they should not be: every recipe of fewer bits says what it makes of them, and does no harm."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from tersor.errors import InputError, PipelineError
from tersor.ir import Function, Program, run, verify
from tersor.passes import Context, Fidelity, Pipeline, recipes
from tests.passes.programs import Transformer

QUANTIZING = ("bf16", "fp16", "int8", "int8-dynamic", "int8-gptq", "int8-mixed")
CALIBRATED = ("int8", "int8-gptq", "int8-mixed")
RECOVERING = ["recover.least_squares", "quantize.rtn", "recover.bias"]
EMPTY = "no calibration data reaches"


def model() -> Program:
    return Transformer(layers=2).build()


def batch(x: torch.Tensor, tokens: int | None = None) -> dict[str, torch.Tensor]:
    mask = torch.ones(len(x), 1, 1, x.shape[1], dtype=torch.bool)
    mask[..., tokens if tokens is not None else x.shape[1] :] = False
    return {"x": x, "mask": mask}


def normal(count: int = 5, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [batch(torch.randn(2, 8, 16, generator=generator)) for _ in range(count)]


def of_recipe(name: str, made: Program, calibration):
    return recipes.get(name).run(made, Context(numerics="never"), calibration=calibration)


def is_faithful(made: Program, after: Program, data=None) -> bool:
    """Whether outputs are near, on data of the usual kind unless given."""
    return Fidelity(made, data or normal(seed=7))(after)["sqnr_db"] > 20


# -- data


@pytest.mark.parametrize("recipe", QUANTIZING)
@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_data_that_is_not_finite_is_refused(recipe, value):
    data = normal()
    data[3]["x"][1, 2, 3] = value
    with pytest.raises(InputError, match="'x' holds NaN or infinity") as raised:
        of_recipe(recipe, model(), data)
    assert raised.value.where == "calibration batch 3"


@pytest.mark.parametrize("recipe", CALIBRATED)
def test_values_that_overflow_inside_the_model_are_named(recipe):
    made = model()
    made.parameters["block.0.ffn.up.weight"] = made.parameters["block.0.ffn.up.weight"].tensor * 1e38
    with pytest.raises(InputError, match="block.1.attention.norm .* is NaN or infinite"):
        of_recipe(recipe, made, normal())


@pytest.mark.parametrize("recipe", ["int8-dynamic", *CALIBRATED])
@pytest.mark.parametrize("value", [0.0, -3e-30, 1e6])
def test_constant_data_makes_a_program_that_runs(recipe, value):
    made, data = model(), [batch(torch.full((2, 8, 16), value)) for _ in range(4)]
    after, report = of_recipe(recipe, made, data)
    verify(after)
    assert all(torch.isfinite(t).all() for t in run(after.main, data[0]).values())
    assert is_faithful(made, after, data)
    skips = report.step("smooth.smoothquant").skips
    assert skips and all(skip.reason for skip in skips)
    if not value and recipe != "int8-dynamic":  # zeros say nothing of ranges: none are made up
        assert is_faithful(made, after)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_constant_data_does_recovery_no_harm(value):
    made, data = model(), [batch(torch.full((2, 8, 16), value)) for _ in range(4)]
    after, _ = Pipeline(RECOVERING).run(made, Context(reference=made), calibration=data)
    assert is_faithful(made, after)


@pytest.mark.parametrize("recipe", CALIBRATED)
@pytest.mark.parametrize("count", [1, 2])
def test_one_sample_is_enough_and_the_report_says_what_that_means(recipe, count):
    made, data = model(), [batch(torch.randn(count, 8, 16, generator=torch.Generator().manual_seed(1)))]
    after, report = of_recipe(recipe, made, data)
    assert is_faithful(made, after)
    told = "no calibration data is held out: passes are judged on what they were fitted to"
    assert (told in report.notes) == (count == 1) and (told in str(report)) == (count == 1)


def test_recovery_from_one_sample_does_no_harm():
    made, data = model(), [batch(torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(1)))]
    after, _ = Pipeline(RECOVERING).run(made, Context(reference=made), calibration=data)
    assert is_faithful(made, after)


def fixed_scales(function: Function) -> list[fx.Node]:
    """Values that are encoded with a scale from data."""
    return [node for node in function.calls("quantize") if node.args[1].op == "get_attr"]


@pytest.mark.parametrize("recipe", CALIBRATED)
def test_data_that_is_padding_alone_reaches_nothing_and_every_layer_says_so(recipe):
    made, data = model(), [batch(torch.randn(2, 8, 16), tokens=0) for _ in range(4)]
    after, report = of_recipe(recipe, made, data)
    verify(after)
    assert not fixed_scales(after.main), "ranges of activations are not made up"
    unreached = {f.site for step in report.steps for f in (*step.changes, *step.skips) if EMPTY in f.reason}
    assert {n.meta["site"] for n in made.main.calls("linear")} <= unreached
    assert is_faithful(made, after)


@pytest.mark.parametrize("recipe", CALIBRATED)
def test_a_function_that_data_does_not_reach_has_no_fixed_scales(recipe):
    made = model()
    other = made.add_function("other", made.main.dims)
    x, build = other.add_input("x", made.main.inputs["x"]), other.builder()
    weight = build.parameter("other.weight", torch.eye(16))
    other.set_outputs({"y": build.linear(x, weight, None, site="elsewhere")})
    after, report = of_recipe(recipe, made, normal())
    assert not fixed_scales(after.functions["other"])
    reasons = {
        f.reason for step in report.steps for f in (*step.changes, *step.skips) if f.site == "elsewhere"
    }
    assert any(EMPTY in reason or "is run on data" in reason for reason in reasons)


@pytest.mark.parametrize("recipe", CALIBRATED)
def test_without_data_the_error_says_what_to_do(recipe):
    with pytest.raises(PipelineError, match=f"recipe '{recipe}' needs calibration data") as raised:
        of_recipe(recipe, model(), None)
    assert raised.value.fix.startswith(
        "give calibration=batches (--calibration FOLDER), or use recipe 'int8-dynamic'"
    )


# -- models


@pytest.mark.parametrize("recipe", QUANTIZING)
@pytest.mark.parametrize("before", ["int8", "int8-dynamic"])
def test_a_model_that_is_quantized_already_stays_as_it_is(recipe, before):
    made, _ = of_recipe(before, model(), normal())
    after, report = of_recipe(recipe, made, normal())
    assert after.digest() == made.digest()
    assert not any(step.modified for step in report.steps)


@pytest.mark.parametrize("recipe", QUANTIZING)
def test_the_rest_of_a_model_that_is_quantized_in_part_is_quantized(recipe):
    made = model()
    first = [{"pass": name, "only": ["block.0.*"]} for name in ("quantize.rtn", "quantize.static")]
    partly, _ = Pipeline(first).run(made, calibration=normal())
    codes = {name: p.digest for name, p in partly.parameters.items() if name.endswith(".codes")}
    after, report = of_recipe(recipe, partly, normal())
    assert codes.items() <= {name: p.digest for name, p in after.parameters.items()}.items(), "codes stay"
    reasons = {s.reason for step in report.steps for s in step.skips if s.site == "block.0.ffn.up"}
    assert reasons & {"its weight is stored in codes already", "it is 'quantized' already"}
    assert after.parameters.bytes < partly.parameters.bytes and is_faithful(made, after)
    if recipe not in ("bf16", "fp16"):
        assert len(after.main.calls("integer_linear")) >= 6 and not after.main.calls("linear")


def test_constant_layers_and_layers_of_zeros_survive_every_recipe():
    made = model()
    for name, value in (("block.0.ffn.up.weight", 0.0), ("block.1.ffn.down.weight", 0.25)):
        made.parameters[name] = torch.full_like(made.parameters[name].tensor, value)
    for recipe in QUANTIZING:
        after, _ = of_recipe(recipe, made, normal())
        assert is_faithful(made, after), recipe
