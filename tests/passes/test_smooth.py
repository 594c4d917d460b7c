"""Smoothing: exact before anything is rounded, worth its while where outliers are planted, harmless where none are."""

from __future__ import annotations

import pytest
import torch

from tersor.errors import PipelineError
from tersor.ir import Program, run
from tersor.passes import Context, Fidelity, Pipeline, recipes
from tersor.passes.calibration import Calibration, Dataset, MinMax, Request, Samples, calibrate
from tersor.passes.quantize.grid import Grid
from tersor.passes.smooth.engine import Candidate, Smoothing
from tersor.passes.smooth.error import Observed, Rounding, Trial
from tersor.passes.smooth.outlier_suppression_plus import OutlierSuppressionPlus
from tersor.passes.smooth.places import norm_place
from tersor.passes.smooth.repq import RepQ
from tersor.passes.smooth.smoothquant import SmoothQuant
from tests.passes.check_pass import apply, assert_same_structure, check_pass
from tests.passes.programs import Transformer, Weights, program

PASSES = (SmoothQuant(), SmoothQuant(alpha=0.5), OutlierSuppressionPlus(), RepQ())
OUTLIERS = torch.arange(0, 256, 43)  # 6 of 256 channels


def data(width: int, count: int = 10, rows: int = 32, mask: bool = False) -> list[dict[str, torch.Tensor]]:
    """Normal inputs, cut at 2.5 so that held-out data has the range of the rest."""
    generator = torch.Generator().manual_seed(5)
    made = []
    for _ in range(count):
        batch = {"x": torch.randn(2, rows, width, generator=generator).clamp(-2.5, 2.5)}
        made.append(batch | ({"mask": torch.ones(2, 1, 1, rows, dtype=torch.bool)} if mask else {}))
    return made


def normed(
    gamma: torch.Tensor, beta: torch.Tensor | None = None, *, kind: str = "layer_norm", outputs: int = 128
):
    """A norm into two linear layers."""
    width = len(gamma)

    def emit(build, x, mask):
        make = Weights(build)
        operands = [build.parameter("norm.weight", gamma)]
        if beta is not None:
            operands.append(build.parameter("norm.bias", beta))
        norm = getattr(build, kind)(x, *operands, site="norm")
        return {f"y{i}": make.linear(norm, f"linear.{i}", outputs, width, bias=i == 0) for i in range(2)}

    return program(emit, width=width)


def outlying(factor: float = 50.0) -> torch.Tensor:
    gamma = torch.ones(256)
    gamma[OUTLIERS] = factor
    return gamma


def one_sided(height: float = 50.0) -> torch.Tensor:
    beta = torch.zeros(256)
    beta[OUTLIERS] = height
    return beta


def figures(pass_: Smoothing, made: Program) -> dict[str, float]:
    """Held-out errors at the norm, before and after."""
    _, report = Pipeline([pass_]).run(made, calibration=data(256))
    (found,) = [f for f in (*report.steps[0].changes, *report.steps[0].skips) if f.figures]
    return found.figures


def gain(pass_: Smoothing, made: Program, weights: bool = True) -> float:
    """How many times smaller the error is that a program makes, quantized at its linear layers, on held-out data.

    Measured by itself: ranges and outputs are read off runs of both programs.
    """
    after, _ = Pipeline([pass_]).run(made, calibration=data(256))
    return quantized_error(made, pass_, weights) / quantized_error(after, pass_, weights)


def quantized_error(made: Program, pass_: Smoothing, weights: bool) -> float:
    function, fresh = made.main, [{"x": b["x"].flip(0) * torch.where(b["x"] > 0, -1, 1)} for b in data(256)]
    linears = function.calls("linear")
    inputs = []
    for batch in fresh:
        run(function, batch, observe=lambda n, t: inputs.append(t) if n is linears[0].args[0] else None)
    x = torch.cat(inputs).reshape(-1, 256)
    if pass_.activations == "tensor":
        grid = Grid(pass_.bits, symmetric=False)
        rounded = grid.round_trip(x, *grid.fit(x.min(), x.max()))
    else:
        rounded = Grid(pass_.bits).round_trip(x, Grid(pass_.bits).fit_rows(x)[0].unsqueeze(1))
    error = power = 0.0
    for linear in linears:
        weight, grid = function.parameter(linear.args[1]), Grid(pass_.bits)
        stored = grid.round_trip(weight, grid.fit_rows(weight)[0].unsqueeze(1)) if weights else weight
        difference = rounded @ stored.T - x @ weight.T
        error += difference.square().sum().item()
        bias = (
            function.parameter(linear.args[2]) if len(linear.args) > 2 and linear.args[2] is not None else 0.0
        )
        power += (x @ weight.T + bias).square().sum().item()
    return error / power


# -- planted structure, and none


def test_smoothquant_cuts_the_error_of_planted_outliers():
    least = {0.0: 0.9, 0.3: 3.7, 0.5: 10, 0.7: 10.8, 0.85: 5.9, 1.0: 2.2}
    gains = {alpha: gain(SmoothQuant(alpha=alpha), normed(outlying())) for alpha in least}
    assert all(gains[alpha] >= least[alpha] for alpha in least), gains
    assert gains[0.5] > gains[0.3] > gains[0.0] and gains[0.5] > gains[1.0], "the best is in between"
    assert gain(SmoothQuant(), normed(outlying())) >= 10
    assert gain(SmoothQuant(activations="token"), normed(outlying())) >= 6.65


@pytest.mark.parametrize("pass_", PASSES, ids=str)
def test_without_outliers_nothing_is_lost(pass_):
    assert gain(pass_, normed(torch.ones(256))) >= 0.9


@pytest.mark.parametrize("bits", [8, 6])
def test_shifts_cut_the_error_of_one_sided_outliers(bits):
    made = normed(torch.ones(256), one_sided())
    assert gain(OutlierSuppressionPlus(bits=bits), made) >= 29.5
    assert gain(OutlierSuppressionPlus(bits=bits), made) > 2 * gain(SmoothQuant(bits=bits), made)


@pytest.mark.parametrize(("bits", "all_rounded"), [(8, 1.65), (6, 1.85), (4, 1.0)])
def test_repq_cuts_the_error_of_uneven_channels(bits, all_rounded):
    spread = normed(torch.randn(256, generator=torch.Generator().manual_seed(1)).exp())
    assert gain(RepQ(bits=bits), spread) >= all_rounded
    assert gain(RepQ(bits=bits), spread, weights=False) >= 4


def test_codes_per_tensor_after_repq_are_those_per_channel_before():
    made = normed(torch.randn(256).exp(), torch.randn(256) * 0.1)
    observed = Observed(*made_rows(made), [])
    place = norm_place(made.main, made.main.calls("layer_norm")[0])
    (candidate,) = RepQ().candidates(place, observed)
    grid, x = Grid(8, symmetric=False), observed.fit
    scale, zero = grid.fit(observed.low, observed.high)
    before = grid.codes(x, scale, zero)
    after = grid.codes((x - candidate.z) / candidate.s, scale.mean(), zero.mean().round())
    assert (before - after).abs().max() <= 1, "only halves may fall to the other side"
    assert (before != after).float().mean() < 1e-3


def made_rows(made: Program) -> tuple[torch.Tensor, ...]:
    asked = [Request("norm", what, of="output") for what in (MinMax(), Samples(200))]
    found = calibrate(made, asked, Dataset.read(Calibration(data(256)), made.main))
    bounds, rows = (found.get(request) for request in asked)
    return bounds.low, bounds.high, rows.rows, rows.rows


def test_thresholds_are_relative_to_the_values():
    """The published search goes down to 1 whatever the values; small ones would be left alone."""
    made = normed(torch.full((256,), 1e-4), one_sided(50e-4))
    assert gain(OutlierSuppressionPlus(), made) >= 29.5


def test_ranges_of_activations_are_those_of_the_smoothed_program():
    made, batches = normed(outlying()), data(256)
    after, _ = Pipeline(
        ["smooth.smoothquant", "quantize.rtn", {"pass": "quantize.static", "method": "minmax"}]
    ).run(made, calibration=batches)
    (encoding,) = after.main.calls("quantize")
    norm, scale = encoding.args[0], after.main.parameter(encoding.args[1])
    seen = []
    for batch in batches:
        run(after.main, batch, observe=lambda n, t: seen.append((t.min(), t.max())) if n is norm else None)
    widest = max(high for _, high in seen) - min(low for low, _ in seen)
    assert 0.7 * widest <= 255 * scale <= 1.01 * widest < 20, "outliers reach 100 before"


# -- exactness


def transformer(**options) -> Program:
    """A Transformer whose norms have outliers."""
    made = Transformer(**{"mask": None, "width": 32, "neurons": 48} | options).build()
    for name in made.parameters:
        if name.endswith("norm.weight"):
            gamma = made.parameters[name].tensor.clone()
            gamma[:3] *= 30
            made.parameters[name] = gamma
        if name.endswith("value.weight"):
            rows = made.parameters[name].tensor.clone()
            rows[0] *= 40
            made.parameters[name] = rows
        if name.endswith("up.weight"):
            rows = made.parameters[name].tensor.clone()
            rows[1] *= 40
            made.parameters[name] = rows
    return made


FORMS = {
    "pre-norm": {},
    "post-norm": {"post_norm": True},
    "llama": {"rms": True, "gated": True, "kv_heads": 2, "rotary": True, "bias": False, "causal": True},
    "without bias": {"bias": False},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pass_", PASSES, ids=str)
def test_every_pass_is_exact_on_every_form_of_block(pass_, form):
    made = transformer(**FORMS[form])
    after = check_pass(
        pass_,
        made,
        None,
        unmatched=behind_gelu(),
        idempotent=isinstance(pass_, SmoothQuant),
        calibration=data(32, count=5),
    )
    assert after is not made


def behind_gelu() -> Program:
    """A layer behind a GELU, through which no scale passes, and one behind nothing."""

    def emit(build, x, mask):
        make = Weights(build)
        return {"y": make.linear(build.gelu(make.linear(x, "up", 48, 32)), "down", 32, 48)}

    return program(emit, width=32)


def with_residual(*given: tuple[torch.Tensor, torch.Tensor]) -> Program:
    """norm -> linear and -> residual, in the form that smoothing by these s and z one after the other gives it."""

    def emit(build, x, mask):
        make = Weights(build)
        gamma, beta, weight, bias = make.tensor(8), make.tensor(8), make.tensor(4, 8), make.tensor(4)
        scale, shift = torch.ones(8), torch.zeros(8)
        for s, z in given:
            bias, weight = bias + weight @ z, weight * s
            gamma, beta = gamma / s, (beta - z) / s
            scale, shift = scale * s, shift + z * scale
        kept = norm = build.layer_norm(
            x, build.parameter("norm.weight", gamma), build.parameter("norm.bias", beta), site="norm"
        )
        if given:
            kept = build.add(build.mul(norm, build.parameter("s", scale)), build.parameter("z", shift))
        residual = build.add(kept, x, site="other")
        y = build.linear(norm, build.parameter("w", weight), build.parameter("b", bias), site="linear")
        return {"residual": residual, "y": y}

    return program(emit, width=8)


class Given(Smoothing):
    """Smooths by s and z that are made up, whatever it costs."""

    times: int = 1

    def candidates(self, place, observed):
        s = torch.tensor([2.0, 0.5, 1.5, 4.0, 1.0, 1.0, 3.0, 0.25])
        z = torch.tensor([1.0, 0.0, -2.0, 0.5, 0.0, 0.0, 3.0, -1.0])
        yield Candidate(s**self.times, z * self.times, "given")


def test_the_residual_stream_gets_back_what_it_read(monkeypatch):
    """Also a second time, by way of the multiplication and addition that are there."""
    monkeypatch.setattr(Trial, "error", lambda *_: 0.0)
    passes = [Given(), Given(times=2)]
    given = [(c.s, c.z) for p in passes for c in p.candidates(None, None)]
    made = with_residual()
    for count in (1, 2):
        after, _ = Pipeline(passes[:count]).run(made, Context(numerics="always"), calibration=data(8))
        assert_same_structure(after, with_residual(*given[:count]))
    after, _ = Pipeline([SmoothQuant(alpha=0.5)]).run(made, calibration=data(8))
    assert [n.target.name for n in after.main.calls()].count("mul") == 1
    again, _ = Pipeline([Given(times=2)]).run(after, Context(numerics="always"), calibration=data(8))
    assert [n.target.name for n in again.main.calls()].count("mul") == 1, "the factor there took s in"


def test_a_layer_norm_without_parameters_and_layers_without_biases_get_some():
    def emit(build, x, mask):
        make = Weights(build)
        outlying = build.mul(build.layer_norm(x), build.parameter("planted", torch.eye(8)[0] * 30 + 1))
        return {"y": make.linear(build.layer_norm(outlying, site="norm"), "linear", 4, 8, bias=False)}

    made = program(emit, width=8)
    batches = [{"x": batch["x"].abs()} for batch in data(8)]
    after = apply(OutlierSuppressionPlus(bits=4), made, batches)
    norm, linear = after.main.calls("layer_norm")[-1], after.main.calls("linear")[0]
    assert len(norm.args) == 3 and len(linear.args) == 3


def test_heads_of_a_group_share_scales():
    made = transformer(kv_heads=2, layers=1, bias=False)
    after = apply(SmoothQuant(kinds=("value",)), made, data(32))
    old, new = (p.parameters["block.0.attention.output.weight"].tensor for p in (made, after))
    s = (new / old)[0].reshape(2, 2, 8)
    torch.testing.assert_close(s[:, 0], s[:, 1])
    assert s.std() > 0.1


def test_branches_that_share_a_norm_share_scales():
    def emit(build, x, mask):
        make = Weights(build)
        norm = build.layer_norm(x, build.parameter("norm.weight", outlying()), site="norm")
        return {"y": make.linear(norm, "attention", 16, 256), "z": make.linear(norm, "ffn", 64, 256)}

    made = program(emit, width=256)
    after = apply(SmoothQuant(alpha=0.5), made, data(256, count=4))
    for name in ("attention.weight", "ffn.weight"):
        s = (after.parameters[name].tensor / made.parameters[name].tensor)[0]
        torch.testing.assert_close(
            s, made.parameters["norm.weight"].tensor / after.parameters["norm.weight"].tensor
        )


def ffn(activation: str) -> Program:
    """up -> activation -> down, one channel between them far wider than the others."""

    def emit(build, x, mask):
        make = Weights(build)
        up = make.tensor(48, 32)
        up[3] *= 50
        hidden = getattr(build, activation)(build.linear(x, build.parameter("up", up), site="up"))
        return {"y": make.linear(hidden, "down", 32, 48)}

    return program(emit, width=32)


def test_relu_lets_a_scale_through():
    made = ffn("relu")
    after = apply(SmoothQuant(), made, data(32))
    assert after.parameters["up"].tensor[3].abs().max() < made.parameters["up"].tensor[3].abs().max() / 2
    assert not any(node.target.name == "mul" for _, node in after.nodes() if node.op == "call_function")


def test_what_gelu_makes_gets_a_factor_once():
    made = ffn("gelu")
    after = apply(SmoothQuant(alpha=0.2), made, data(32))
    assert torch.equal(after.parameters["up"].tensor, made.parameters["up"].tensor)
    (factor,) = (name for name in after.parameters if name not in made.parameters)
    grown = after.parameters["down.weight"].tensor / made.parameters["down.weight"].tensor
    torch.testing.assert_close(grown, (1 / after.parameters[factor].tensor).expand_as(grown))
    assert after.parameters[factor].tensor.argmin() == 3
    stronger = apply(SmoothQuant(alpha=0.6), after, data(32))
    assert set(stronger.parameters) == set(after.parameters), "the factor that is there takes the rest in"
    assert not torch.equal(stronger.parameters[factor].tensor, after.parameters[factor].tensor)


def test_readers_that_are_no_layers_keep_what_gelu_made():
    def emit(build, x, mask):
        make = Weights(build)
        up = make.tensor(32, 32)
        up[3] *= 50
        hidden = build.gelu(build.linear(x, build.parameter("up", up), site="up"))
        return {"y": build.add(make.linear(hidden, "down", 32, 32), hidden)}

    apply(SmoothQuant(), program(emit, width=32), data(32))  # checks that the outputs stay


def test_no_factor_is_put_behind_a_change_of_shape():
    def emit(build, x, mask):
        make = Weights(build)
        both = build.concat([make.linear(x, "left", 32, 32), make.linear(x, "right", 32, 32)], dim=-1)
        return {"y": make.linear(both, "down", 32, 64)}

    found = reasons(SmoothQuant(), program(emit, width=32), data(32))
    assert found["down"] == "its input comes through concat, through which no scale passes"


def test_a_place_that_no_range_suits_is_smoothed_for_scales_per_token():
    """Of rows that differ a thousandfold the large ones decide for one range, all alike for a range each."""

    def emit(build, x, mask):
        make = Weights(build)
        up = make.tensor(48, 32)
        up[3] *= 50
        hidden = build.relu(build.linear(x, build.parameter("up", up), site="up"))
        return {"y": make.linear(hidden, "down", 32, 48)}

    rows = data(32)
    for batch in rows:
        batch["x"][:, ::4] *= 1000
    found = {}
    for options in ({}, {"largest_error": 1e-5}, {"largest_error": 1.0}, {"activations": "token"}):
        _, report = Pipeline([SmoothQuant(**options)]).run(program(emit, width=32), calibration=rows)
        (found[str(options)],) = report.steps[0].changes
    plain, strict, lenient, token = found.values()
    assert (strict.reason, strict.figures) == (token.reason, token.figures) != (plain.reason, plain.figures)
    assert (lenient.reason, lenient.figures) == (plain.reason, plain.figures)


def test_zeros_in_weights_stay():
    made = normed(outlying())
    weight = made.parameters["linear.0.weight"].tensor.clone()
    weight[:, ::2] = 0
    made.parameters["linear.0.weight"] = weight
    after = apply(SmoothQuant(), made, data(256, count=4))
    assert torch.equal(after.parameters["linear.0.weight"].tensor == 0, weight == 0)


# -- order


def test_wanda_s_choice_of_weights_is_the_same_before_and_after():
    made = normed(outlying())
    after = apply(SmoothQuant(), made, data(256, count=4))
    kept = []
    for version in (made, after):
        low, high, rows, _ = made_rows(version)
        scores = version.parameters["linear.0.weight"].tensor.abs() * rows.double().norm(dim=0)
        kept.append(scores.argsort(1)[:, 128:].sort(1).values)
    assert (kept[0] == kept[1]).float().mean() > 0.999


# -- what is left alone, and why


def reasons(pass_: Smoothing, made: Program, batches) -> dict[str, str]:
    _, report = Pipeline([pass_]).run(made, calibration=batches)
    return {skip.site: skip.reason for skip in report.steps[0].skips}


def test_every_place_that_is_left_alone_has_a_reason():
    made = transformer(layers=1, head_norm=True)
    found = reasons(SmoothQuant(kinds=("norm",), skip=("block.0.ffn.up",)), made, data(32))
    assert found["block.0.ffn.norm"] == "it would change block.0.ffn.up, named in skip="
    assert found["block.0.attention.output"] == "kinds= leaves out places of kind 'value'"
    assert found["block.0.ffn.down"] == "kinds= leaves out places of kind 'activation'"
    assert found["block.0.attention.query_norm"] == "no linear layer with plain weights reads it"


def test_constant_data_and_data_that_reaches_nothing_are_stated():
    made = Transformer(layers=1, width=32).build()
    constant = [{"x": torch.ones(1, 4, 32), "mask": torch.ones(1, 1, 1, 4, dtype=torch.bool)}] * 3
    assert reasons(SmoothQuant(), made, constant)["block.0.attention.norm"] == (
        "its value is the same for all calibration data"
    )
    hidden = [{"x": torch.randn(1, 4, 32), "mask": torch.zeros(1, 1, 1, 4, dtype=torch.bool)}] * 3
    assert set(reasons(SmoothQuant(kinds=("norm",)), made, hidden).values()) >= {
        "no calibration data reaches it"
    }


def test_a_tied_weight_is_left_alone():
    def emit(build, x, mask):
        make = Weights(build)
        table = build.parameter("table", make.tensor(8, 256))
        rows = build.embedding(build.minimum(build.argmax(x, dim=-1), 7), table)
        norm = build.layer_norm(build.add(rows, x), build.parameter("norm.weight", outlying()), site="norm")
        return {"y": build.linear(norm, table, site="head")}

    assert "also read by" in reasons(SmoothQuant(), program(emit, width=256), data(256, count=4))["norm"]


@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 1.5},
        {"bits": 9},
        {"samples": 0},
        {"largest_error": 0.0},
        {"kinds": ("norms",)},
        {"activations": "row"},
    ],
)
def test_wrong_options_are_refused(options):
    with pytest.raises(PipelineError):
        SmoothQuant(**options)
    with pytest.raises(PipelineError):
        OutlierSuppressionPlus(steps=0)


def test_a_shift_into_two_thin_layers_is_no_broken_promise():
    """The first of them gets a bias, so the two are not a factorized layer to the table of facts any more."""

    def emit(build, x, mask):
        make = Weights(build)
        gamma, beta = (
            build.parameter("norm.weight", torch.ones(256)),
            build.parameter("norm.bias", one_sided()),
        )
        low = make.linear(build.layer_norm(x, gamma, beta, site="norm"), "first", 4, 256, bias=False)
        return {"y": make.linear(low, "second", 256, 4)}

    made = program(emit, width=256)
    after = apply(OutlierSuppressionPlus(), made, data(256, count=4))
    assert after is not made


def test_the_table_of_places_is_in_the_report():
    _, report = Pipeline([SmoothQuant()]).run(transformer(layers=1), calibration=data(32))
    found = report.to_dict()["steps"][0]["changes"]
    assert all(change["figures"]["error_after"] < change["figures"]["error_before"] for change in found)
    assert "place by place" in str(report) and "block.0.ffn.norm" in str(report)


def test_rounding_error_of_exact_codes_is_nothing():
    grid_points = torch.arange(-127.0, 128.0).unsqueeze(1)
    observed = Observed(
        torch.tensor([-127.0]),
        torch.tensor([128.0]),
        grid_points,
        grid_points,
        [torch.tensor([[127.0], [64.0]])],
    )
    assert Trial(observed, grid_points, Rounding()).error() < 1e-12
    assert Trial(observed, grid_points + 0.5, Rounding()).error() > 1e-6


def test_scales_of_groups_are_what_a_place_is_judged_by():
    """Outliers cost their groups digits, not all: what is gained by taking them out is what these lose."""
    made = normed(outlying())
    whole, halves, small = (
        figures(SmoothQuant(activations="token", group=group), made) for group in (None, 128, 32)
    )
    assert whole["error_before"] > 1.3 * halves["error_before"] > 1.6 * small["error_before"]
    assert all(f["error_after"] < f["error_before"] for f in (whole, halves, small))
    with pytest.raises(PipelineError, match="at least 16"):
        SmoothQuant(group=8)


# -- where data is welcome and not needed


def test_dynamic_codes_are_smoothed_where_there_is_data():
    made, batches = normed(outlying()), data(256)
    recipe = [
        "smooth.smoothquant",
        "quantize.embeddings",
        "quantize.rtn",
        "quantize.dynamic",
        "quantize.bf16",
    ]
    assert [p.name for p in recipes.get("int8-dynamic").passes][-7:-2] == recipe
    assert "left out without calibration data" in str(recipes.get("int8-dynamic").explain())
    bare, report = recipes.get("int8-dynamic").run(made)
    step = report.step("smooth.smoothquant")
    assert (step.status, step.notes) == ("skipped", ["it goes by calibration data, and there is none"])
    assert step.notes[0] in str(report)
    unsmoothed, _ = recipes.get("int8-dynamic").remove("smooth.smoothquant").run(made, calibration=batches)
    assert bare.digest() == unsmoothed.digest()
    smoothed, report = recipes.get("int8-dynamic").run(made, calibration=batches)
    assert report.step("smooth.smoothquant").modified
    judge = Fidelity(made, [{"x": batch["x"].flip(0)} for batch in batches])
    assert judge(smoothed)["sqnr_db"] > judge(bare)["sqnr_db"] + 10


def test_what_cannot_do_without_data_is_still_refused():
    with pytest.raises(PipelineError, match="needs calibration data"):
        Pipeline([SmoothQuant()]).run(normed(outlying()))
    after, _ = Pipeline([SmoothQuant(optional=True)]).run(made := normed(outlying()))
    assert after is made
