"""Bits by layer: the best choice within a budget, the budget kept, and the layer that must stay wide kept wide."""

from __future__ import annotations

import itertools
import random
import re

import pytest
import torch

from tersor.errors import PipelineError
from tersor.ir import Program
from tersor.passes import Context, Fidelity, Pipeline
from tersor.passes.calibration import Calibration, Dataset
from tersor.passes.quantize.allocation import Option, allocate
from tersor.passes.quantize.mixed import MixedPrecision
from tests.passes.check_pass import check_pass
from tests.passes.programs import Transformer, Weights, program

WIDTH, LENGTH = 16, 8
INT8 = ["quantize.rtn", "quantize.static"]


# -- the choice


def brute_force(places, budget: float) -> float | None:
    sums = [
        (sum(o.spent for o in chosen), sum(o.lost for o in chosen)) for chosen in itertools.product(*places)
    ]
    return min((lost for spent, lost in sums if spent <= budget), default=None)


def random_places(rng: random.Random, count: int, sizes: int = 50) -> list[list[Option]]:
    return [
        [Option(rng.randint(0, sizes), rng.random()) for _ in range(rng.randint(1, 3))] for _ in range(count)
    ]


@pytest.mark.parametrize("seed", range(40))
def test_the_choice_is_the_best_of_all(seed):
    rng = random.Random(seed)
    places = random_places(rng, rng.randint(1, 7))
    budget = rng.randint(0, 50 * len(places))
    found, best = allocate(places, budget), brute_force(places, budget)
    assert (found is None) == (best is None)
    if found is not None:
        chosen = [options[i] for options, i in zip(places, found.choices, strict=True)]
        assert found.spent == sum(o.spent for o in chosen) <= budget
        assert found.lost == pytest.approx(sum(o.lost for o in chosen)) and found.slack == 0
        assert found.lost == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_a_choice_among_too_many_is_off_by_no_more_than_it_says(seed):
    rng = random.Random(seed)
    places = random_places(rng, 8, sizes=10_000)
    budget = rng.randint(20_000, 60_000)
    found = allocate(places, budget, limit=40)
    if found is None:
        assert brute_force(places, budget) is None
        return
    reached = brute_force(places, (1 - found.slack) * budget)
    assert found.spent <= budget and (reached is None or found.lost <= reached + 1e-12)


def test_a_budget_for_everything_chooses_what_loses_nothing_and_one_for_nothing_the_least():
    places = [[Option(4, 0.0), Option(2, 0.1), Option(1, 0.3)]] * 5
    assert allocate(places, 20).choices == (0,) * 5
    assert allocate(places, 5).choices == (2,) * 5 and allocate(places, 4.9) is None
    assert allocate([], 0.0).choices == ()


# -- the pass


def batches(count: int = 10, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"x": torch.randn(2, LENGTH, WIDTH, generator=generator)} for _ in range(count)]


def transformer(wide: bool = False) -> Program:
    """Two blocks; ``wide`` plants a neuron that is large and hardly read, so that 8 bits lose its neighbours."""
    made = Transformer(layers=2, mask=None).build()
    if wide:
        for role, dim, factor in (("up", 0, 300.0), ("down", 1, 1 / 300)):
            name = f"block.0.ffn.{role}.weight"
            tensor = made.parameters[name].tensor.clone()
            tensor.select(dim, 3).mul_(factor)
            made.parameters[name] = tensor
    return made


def run(made: Program, *passes, **options):
    after, report = Pipeline([*passes] or [MixedPrecision(**options)]).run(made, calibration=batches())
    return after, report.steps[-1]


def bits(step) -> dict[str, int]:
    return {f.site: f.figures["bits"] for f in (*step.changes, *step.skips) if "bits" in f.figures}


def sqnr(made: Program, after: Program) -> float:
    """On data that nothing was fitted to or judged by."""
    return Fidelity(made, batches(seed=9))(after)["sqnr_db"]


def one_layer(build, x, mask):
    return {"y": Weights(build).linear(x, "layer", 8, WIDTH)}


def in_codes() -> Program:
    return Pipeline(["quantize.rtn"]).run(program(one_layer))[0]


@pytest.mark.parametrize(
    "options",
    [{"min_sqnr_db": 30}, {"max_bytes": 8000}, {"min_sqnr_db": 20, "activations": "dynamic"}],
    ids=str,
)
def test_every_form_keeps_the_protocol(options):
    check_pass(
        MixedPrecision(**options), transformer(), None,
        unmatched=in_codes(), idempotent=False, calibration=batches(),
    )  # fmt: skip


@pytest.mark.parametrize("weights", ["rtn", "gptq"])
def test_a_layer_that_must_stay_wide_stays_wide(weights):
    made = transformer(wide=True)
    uniform, _ = run(made, *INT8)
    after, step = run(made, min_sqnr_db=30, weights=weights)
    assert sqnr(made, uniform) < 30 - 6 and sqnr(made, after) > 30 - 1
    found = bits(step)
    assert found.pop("block.0.ffn.down") > 8 and set(found.values()) == {8}
    (layer,) = [f for f in step.changes if f.site == "block.0.ffn.down"]
    assert layer.reason.startswith("bf16: int8 would make") and layer.figures["error_int8"] > 1e-3


def test_without_such_a_layer_all_are_narrow():
    after, step = run(transformer(), min_sqnr_db=30)
    assert set(bits(step).values()) == {8}
    uniform, _ = run(transformer(), *INT8)
    assert after.digest() == uniform.digest()


@pytest.mark.parametrize("activations", ["static", "dynamic"])
@pytest.mark.parametrize("wanted", [20.0, 40.0, 45.0, 50.0, 130.0])
def test_the_outputs_keep_what_was_asked_for(wanted, activations):
    made = transformer(wide=True)
    after, step = run(made, min_sqnr_db=wanted, activations=activations)
    held_out = Dataset.read(Calibration(batches()), made.main).held_out
    assert Fidelity(made, held_out)(after)["sqnr_db"] >= wanted
    if wanted == 130.0:
        assert after is made and all(f.reason.startswith("f32: bf16 would make") for f in step.skips)


def test_the_program_never_outgrows_its_bytes_and_more_bytes_lose_less():
    made = transformer(wide=True)
    lost = []
    for size in range(5900, made.parameters.bytes + 400, 900):
        after, step = run(made, max_bytes=size)
        assert after.parameters.bytes <= size
        errors = [f.figures.get(f"error_{'int8' if f.figures['bits'] == 8 else 'bf16'}", 0.0)
                  for f in step.changes]  # fmt: skip
        lost.append(sum(errors))
    assert lost == sorted(lost, reverse=True) and lost[-1] == 0


def test_bits_by_layer_lose_less_than_the_same_bytes_spread_evenly():
    made = transformer(wide=True)
    uniform, _ = run(made, {"pass": "quantize.bf16", "kinds": ["linear"]})
    after, _ = run(made, max_bytes=uniform.parameters.bytes)
    assert after.parameters.bytes <= uniform.parameters.bytes
    assert sqnr(made, after) >= sqnr(made, uniform) - 0.5
    narrow, _ = run(made, *INT8)
    after, _ = run(made, max_bytes=round(1.2 * narrow.parameters.bytes))
    assert sqnr(made, after) > sqnr(made, narrow) + 10


def test_a_budget_that_nothing_meets_is_an_error_with_the_one_that_something_does():
    made = transformer()
    with pytest.raises(PipelineError, match="no choice of bits .* 100 bytes") as raised:
        run(made, max_bytes=100)
    least = int(re.search(r"at least (\d+)", str(raised.value))[1])
    after, step = run(made, max_bytes=least)
    assert after.parameters.bytes <= least and set(bits(step).values()) == {8}


def test_the_report_says_what_was_chosen_and_why():
    after, step = run(transformer(wide=True), min_sqnr_db=30)
    assert "11 layers in int8, 1 in bf16, 0 in f32 for at least 30 dB: the best plan" in step.summary
    assert f"in {after.parameters.bytes:,} bytes" in step.summary
    for found in step.changes:
        assert found.figures.keys() >= {
            "error_bf16",
            "error_int8",
            "bytes_before",
            "bytes_after",
            "macs_share",
        }
    report = Pipeline([MixedPrecision(min_sqnr_db=30)]).run(transformer(wide=True), calibration=batches())[1]
    assert step.summary in " ".join(str(report).split()) and "int8 would make" in str(report)
    assert report.to_dict()["steps"][0]["summary"] == step.summary


def test_the_cache_keeps_the_summary(tmp_path):
    for cached in (False, True):
        _, report = Pipeline([MixedPrecision(max_bytes=8000)]).run(
            transformer(), Context(cache=tmp_path), calibration=batches()
        )
        assert report.steps[0].cached == cached and "at most 8,000 bytes" in report.steps[0].summary


def test_layers_of_one_weight_get_one_form():
    def emit(build, x, mask):
        weight = build.parameter("w", Weights(build).tensor(WIDTH, WIDTH))
        inner = build.linear(x, weight, None, site="first")
        return {"y": build.linear(build.gelu(inner), weight, None, site="second")}

    made = program(emit)
    _, step = run(made, max_bytes=made.parameters.bytes - 1)
    assert bits(step) == {"first": 16, "second": 16}
    assert sum(made.parameters[name].tensor.numel() for name in made.parameters) == WIDTH**2


def test_what_cannot_be_narrowed_has_a_reason():
    made = transformer()
    other = made.add_function("other", made.main.dims)
    x = other.add_input("x", made.main.inputs["x"])
    build = other.builder()
    weight = build.parameter("w", torch.ones(4, WIDTH))
    other.set_outputs({"y": build.linear(x, weight, None, site="elsewhere")})
    partly, _ = run(made, {"pass": "quantize.rtn", "only": ["block.0.*"]})
    _, step = run(partly, min_sqnr_db=30, skip=("block.1.ffn.up",))
    reasons = {f.site: f.reason for f in step.skips}
    assert reasons["elsewhere"] == "only main is run on data"
    assert reasons["block.0.ffn.up"] == "its weight is stored in codes already"
    assert "block.1.ffn.up" not in bits(step) and len(bits(step)) == 5


def test_exactly_one_budget_is_given():
    for options in (
        {},
        {"min_sqnr_db": 30.0, "max_bytes": 10},
        {"max_bytes": 0},
        {"min_sqnr_db": 30, "batches": 0},
    ):
        with pytest.raises(PipelineError, match="configuration"):
            MixedPrecision(**options)


def test_the_recipe_becomes_integer_products_and_bf16():
    after, report = Pipeline(
        ["smooth.smoothquant", {"pass": "quantize.mixed", "min_sqnr_db": 30}, "quantize.integers"]
    ).run(transformer(wide=True), calibration=batches())
    assert report.step("quantize.integers").modified and after.main.calls("integer_linear")
