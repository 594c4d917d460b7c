"""What each site costs when it alone is quantized: the right site, the right figures, the right reason."""

from __future__ import annotations

import json
import math

import pytest
import torch

from tersor.errors import InputError, TersorError
from tersor.ir import Program
from tersor.ir.matching import is_call
from tersor.ir.site import sites as program_sites
from tersor.passes import Fidelity, Pipeline
from tersor.passes.analysis import SCHEMES, Analysis, analyze
from tersor.passes.calibration import Calibration, Dataset
from tests.passes.programs import Transformer, Weights, program

WIDTH, LENGTH = 16, 8
INT8 = ("quantize.rtn", "quantize.static")


def batches(count: int = 6, seed: int = 0, wide: int | None = None) -> list[dict[str, torch.Tensor]]:
    """Inputs of a Transformer with padding; channel ``wide`` is 200 times the others."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        x = torch.randn(2, LENGTH, WIDTH, generator=generator)
        if wide is not None:
            x[..., wide] *= 200
        mask = torch.ones(2, 1, 1, LENGTH, dtype=torch.bool)
        mask[1, ..., LENGTH - 2 :] = False
        made.append({"x": x, "mask": mask})
    return made


@pytest.fixture
def made() -> Program:
    return Transformer(layers=2).build()


def planted(made: Program, channel: int = 3) -> Program:
    """Neurons of which one is large and read by small weights only: the layer behind loses the others."""
    up, down = (f"block.0.ffn.{role}.weight" for role in ("up", "down"))
    for name, dim, factor in ((up, 0, 300.0), (down, 1, 1 / 300)):
        tensor = made.parameters[name].tensor.clone()
        tensor.select(dim, channel).mul_(factor)
        made.parameters[name] = tensor
    return made


# -- what it finds


@pytest.mark.parametrize("scheme", ["int8", "int8-dynamic"])
def test_a_bad_layer_comes_out_on_top_with_its_reason(made, scheme):
    before = analyze(made, batches(), schemes=[scheme])["block.0.ffn.down"]
    found = analyze(planted(made), batches(), schemes=[scheme])
    worst = found.sites[0]
    assert worst.site == "block.0.ffn.down"
    assert worst.outcomes[scheme].sqnr_db < before.outcomes[scheme].sqnr_db - 15
    assert worst.outcomes[scheme].output_sqnr_db < before.outcomes[scheme].output_sqnr_db - 15
    assert worst.input_ratio > 20 * before.input_ratio and worst.cause.startswith("input, widest channel")


def test_without_a_bad_layer_none_stands_out(made):
    found = [row.outcomes["int8"].sqnr_db for row in analyze(made, batches(), schemes=["int8"]).sites]
    assert max(found) - min(found) < 15 and min(found) > 30


def test_weights_with_a_wide_column_are_named_as_the_reason(made):
    name = "block.1.ffn.down.weight"
    tensor = made.parameters[name].tensor.clone()
    tensor[:, 5] *= 500
    made.parameters[name] = tensor
    up = made.parameters["block.1.ffn.up.weight"].tensor.clone()
    up[5] /= 500
    made.parameters["block.1.ffn.up.weight"] = up
    worst = analyze(made, batches(), schemes=["int8"])["block.1.ffn.down"]
    assert worst.weight_ratio > 100 and worst.cause.startswith("weights, widest column")
    figures = worst.outcomes["int8"]
    assert figures.weights_sqnr_db < figures.input_sqnr_db
    # independent errors add up
    both = 10 ** (-figures.weights_sqnr_db / 10) + 10 ** (-figures.input_sqnr_db / 10)
    assert -10 * math.log10(both) == pytest.approx(figures.sqnr_db, abs=1)


@pytest.mark.parametrize(
    ("scheme", "passes"),
    [("int8", INT8), ("int8-dynamic", ("quantize.rtn", "quantize.dynamic")), ("bf16", ("quantize.bf16",))],
)
def test_figures_are_those_of_a_program_in_which_the_passes_changed_that_site_alone(made, scheme, passes):
    calibration = Calibration(batches())
    found = analyze(made, calibration, schemes=[scheme], batches=99)
    held_out = Dataset.read(calibration, made.main).held_out
    judge = Fidelity(made, held_out)
    for site in ("block.0.attention.query", "block.1.ffn.up", "block.1.attention"):
        if scheme != "bf16" and site == "block.1.attention":
            with pytest.raises(KeyError):
                found[site]
            continue
        steps = [{"pass": name, "only": [site]} for name in passes]
        after, _ = Pipeline(steps).run(made, calibration=calibration)
        figures = judge(after)
        outcome = found[site].outcomes[scheme]
        # the pass measures ranges behind rounded weights, the analysis in the program as it is: both see one site
        assert outcome.output_sqnr_db == pytest.approx(figures["sqnr_db"], abs=1e-3)
        assert outcome.output_cosine == pytest.approx(figures["cosine"], abs=1e-9)


def test_padding_does_not_count(made):
    clean, dirty = batches(), batches()
    for batch in dirty:
        batch["x"][1, LENGTH - 2 :] = 1e4
    first, second = (analyze(made, data, schemes=["int8"]) for data in (clean, dirty))
    assert [r.site for r in first.sites] == [r.site for r in second.sites]
    for a, b in zip(first.sites, second.sites, strict=True):
        assert a.outcomes["int8"].output_sqnr_db == pytest.approx(b.outcomes["int8"].output_sqnr_db, abs=1e-3)


def test_bytes_and_shares_of_the_work(made):
    found = analyze(made, batches())
    row = found["block.0.ffn.up"]
    assert row.bytes == 4 * (24 * WIDTH + 24)
    assert {s: o.bytes for s, o in row.outcomes.items()} == {
        "int8": 24 * WIDTH + 4 * 24 + 4 * 24,
        "int8-dynamic": 24 * WIDTH + 4 * 24 + 4 * 24,
        "bf16": 2 * 24 * WIDTH + 4 * 24,
    }
    assert sum(r.macs_share for r in found.sites) == pytest.approx(1)
    assert row.macs == 4 * 32 * 24 * WIDTH, "at the largest batch and length"
    assert found["block.0.attention"].outcomes.keys() == {"bf16"} and found["block.0.attention"].bytes == 0
    assert all(r.latency_share is None for r in found.sites)


def test_shares_of_latency_are_those_of_the_measurement(made):
    def profile(program: Program) -> dict[str, float]:
        sites = [site.name for site in program_sites(program) if is_call(site.node, "linear", "attention")]
        return {"": 6.0} | {site: float(i) for i, site in enumerate(sites)}

    seconds = profile(made)
    found = analyze(made, batches(), profile=profile)
    assert len(found) == 14 and "latency" in str(found)
    for row in found.sites:
        assert row.latency_share == seconds[row.site] / (6 + 13 * 14 / 2)


def test_a_program_that_cannot_be_timed_is_analyzed_without(made):
    def profile(program: Program) -> dict[str, float]:
        raise TersorError("no such machine")

    found = analyze(made, batches(), profile=profile)
    assert len(found) == 14 and any("no such machine" in note for note in found.notes)


def test_the_program_stays_as_it_is(made):
    before = made.digest()
    analyze(made, batches())
    assert made.digest() == before


def test_statistics_are_cached(made, tmp_path):
    first = analyze(made, batches(), cache=tmp_path)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert files and analyze(made, batches(), cache=tmp_path) == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == files


# -- what it leaves alone


def test_sites_that_are_quantized_already_are_named(made):
    partly, _ = Pipeline([{"pass": name, "only": ["block.0.*"]} for name in INT8]).run(
        made, calibration=batches()
    )
    lowered, _ = Pipeline(["quantize.integers"]).run(partly)
    for given, reason in ((partly, "stored in codes already"), (lowered, "quantized already")):
        found = analyze(given, batches(), schemes=["int8"])
        assert {row.site for row in found.sites} == {
            f"block.1.{part}"
            for part in (
                *(f"attention.{r}" for r in ("query", "key", "value", "output")),
                "ffn.up",
                "ffn.down",
            )
        }
        left = {site: why for site, why in found.skipped.items() if not site.endswith(".attention")}
        assert len(left) == 6 and all(reason in why for why in left.values())
        assert reason in str(found)


def test_a_layer_that_shares_its_weights_with_a_table_is_left_alone():
    def emit(build, x, mask):
        table = Weights(build)("table", 16, WIDTH)
        return {"y": build.linear(build.embedding(build.argmax(x, dim=-1), table), table, site="head")}

    found = analyze(program(emit), [{"x": torch.randn(1, 4, WIDTH)} for _ in range(3)])
    assert not found.sites and "also read by embedding" in found.skipped["head"]
    assert "head" in str(found)


def test_other_functions_are_named(made):
    other = made.add_function("other", made.main.dims)
    x = other.add_input("x", made.main.inputs["x"])
    build = other.builder()
    weight = build.read("block.0.ffn.up.weight")
    other.set_outputs({"y": build.linear(x, weight, None, site="elsewhere")})
    found = analyze(made, batches(), schemes=["int8"])
    assert found.skipped["elsewhere"] == "only main is run on data" and len(found) == 12


def test_sites_can_be_chosen(made):
    found = analyze(made, batches(), only=["*.ffn.*"], skip=["block.0.*"])
    assert {row.site for row in found.sites} == {"block.1.ffn.up", "block.1.ffn.down"}
    nothing = analyze(made, batches(), only="block.7.*", schemes=["bf16"])
    assert (
        not nothing.sites and "block.7.*: no site of the program fits this pattern of only=" in nothing.notes
    )


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (None, {}, "needs calibration data"),
        ([], {}, "no calibration batches"),
        (3, {}, "calibration data is a int"),
        ("missing", {}, "'missing' is no folder"),
        ("good", {"schemes": ["int4"]}, "no scheme int4"),
        ("good", {"schemes": []}, "nothing to measure"),
        ("good", {"batches": 0}, "nothing to measure"),
        ("good", {"only": ["block.7.ffn.up"]}, "block.7.ffn.up"),
        ([{"x": torch.full((1, 4, WIDTH), torch.nan)}], {}, "lacks 'mask'"),
        ([b | {"x": b["x"] / 0} for b in batches(2)], {}, "NaN or infinity"),
    ],
)
def test_what_cannot_be_analyzed_is_refused(made, data, options, message):
    with pytest.raises(InputError, match=message):
        analyze(made, batches() if data == "good" else data, **options)


def test_one_sample_and_constant_data_have_figures(made):
    constant = [{"x": torch.zeros(1, 4, WIDTH), "mask": torch.ones(1, 1, 1, 4, dtype=torch.bool)}]
    found = analyze(made, constant)
    assert len(found) == 14 and any("held out" in note for note in found.notes)


# -- how it is told


def test_json_holds_everything(made, tmp_path):
    found = analyze(made, batches())
    plain = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert Analysis.from_json(plain) == found
    with pytest.raises(InputError, match="cannot write"):
        found.save(tmp_path / "missing" / "analysis.json")
    found.save(tmp_path / "analysis.json")
    assert Analysis.load(tmp_path / "analysis.json") == found


def test_infinite_figures_survive_json():
    def emit(build, x, mask):
        weight = build.parameter("w", torch.eye(WIDTH))
        return {"y": build.linear(build.mul(x, 0.0), weight, None, site="layer")}

    data = [{"x": torch.randn(1, 4, WIDTH)} for _ in range(3)]
    silent = analyze(program(emit), data)
    assert silent.skipped == {"layer": "the program's outputs are zero on the held-out data"}

    def exact(build, x, mask):
        weight = build.parameter("w", torch.eye(WIDTH))
        return {"y": build.linear(x, weight, None, site="layer")}

    found = analyze(program(exact), [{"x": x["x"].round()} for x in data], schemes=["bf16"])
    assert found["layer"].outcomes["bf16"].sqnr_db == math.inf
    assert Analysis.from_json(json.loads(json.dumps(found.to_json(), allow_nan=False))) == found


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 0}', '{"version": 1, "sites": [{}]}'])
def test_what_is_no_analysis_is_refused(text, tmp_path):
    path = tmp_path / "analysis.json"
    path.write_text(text)
    with pytest.raises(InputError, match="no saved analysis"):
        Analysis.load(path)


def test_the_table_names_sites_in_order_and_every_scheme(made):
    found = analyze(planted(made), batches())
    shown = str(found)
    places = [shown.index(f" {row.site} ") for row in found.sites]
    assert places == sorted(places) and all(f" {scheme} " in shown for scheme in SCHEMES)
