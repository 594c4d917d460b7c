"""GPTQ: nothing else than rounding to the nearest where inputs are independent, better where they are not."""

from __future__ import annotations

import pytest
import torch

from tersor.errors import PipelineError
from tersor.ir import Program
from tersor.passes import Context, Pipeline
from tersor.passes.calibration import Calibration
from tersor.passes.quantize.error_feedback import Curvature, output_errors, round_with_feedback
from tersor.passes.quantize.gptq import GPTQ
from tersor.passes.quantize.grid import Grid
from tersor.passes.quantize.ranges import clipped_rows
from tersor.passes.quantize.rtn import RoundToNearest
from tests.passes.check_pass import apply, check_pass
from tests.passes.programs import Transformer, Weights, program

WIDTH = 128


def correlated(rows: int, seed: int, width: int = WIDTH) -> torch.Tensor:
    """Inputs of which a few directions hold most: a fixed mixture of channels with energies 1 / k."""
    mixture = torch.randn(width, width, generator=torch.Generator().manual_seed(1)) / width**0.5
    energies = torch.arange(1, width + 1).float().rsqrt()
    return (torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * energies) @ mixture


def white(rows: int, seed: int, width: int = WIDTH) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def weight(outputs: int = 64, inputs: int = WIDTH) -> torch.Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(9))


def fitted(w: torch.Tensor, x: torch.Tensor, pass_: GPTQ):
    """Codes of a weight for inputs x, without any judgement."""
    curvature = Curvature.of((x.double().T @ x.double()), len(x), pass_.damp, pass_.act_order)
    return round_with_feedback(
        w, curvature, pass_.grid, pass_.scales,
        group=pass_.group, static_groups=pass_.static_groups, block=pass_.block,
    )  # fmt: skip


def gain(pass_: GPTQ, make) -> float:
    """Held-out output error of rounding to the nearest over that of the pass (roots, as METHODS measures them)."""
    w, fresh = weight(), make(2048, seed=3).double()
    found, nearest = fitted(w, make(2048, seed=2), pass_), pass_.nearest(w)
    errors = [(fresh @ (w - c.values()).double().T).norm() for c in (nearest, found)]
    return float(errors[0] / errors[1])


# -- numbers


@pytest.mark.parametrize("options", [{}, {"group": 16}, {"clip": True}, {"act_order": True}], ids=str)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_independent_inputs_give_the_nearest_codes(bits, options):
    pass_ = GPTQ(bits=bits, **options)
    found, nearest = fitted(weight(), torch.eye(WIDTH), pass_), pass_.nearest(weight())
    assert torch.equal(found.codes, nearest.codes) and torch.equal(found.scale, nearest.scale)


@pytest.mark.parametrize("group", [None, 16, 64])
def test_the_block_size_decides_about_speed_only(group):
    x = correlated(512, seed=2)
    values = [
        fitted(weight(), x, GPTQ(bits=3, group=group, block=block)).values() for block in (1, 16, 24, 128)
    ]
    for other in values[1:]:
        assert (values[0] - other).abs().max() <= 1e-6


@pytest.mark.parametrize(
    "options, least",
    [
        ({"bits": 4}, 1.35),
        ({"bits": 3}, 1.33),
        ({"bits": 2}, 1.25),
        ({"bits": 4, "act_order": True}, 1.44),
        ({"bits": 3, "act_order": True}, 1.45),
        ({"bits": 2, "act_order": True}, 1.34),
        ({"bits": 4, "group": 64}, 1.32),
        ({"bits": 3, "group": 64}, 1.25),
        ({"bits": 2, "group": 64}, 0.95),
        ({"bits": 4, "group": 32}, 1.3),
        ({"bits": 4, "group": 32, "static_groups": True, "act_order": True}, 1.3),
        ({"bits": 8}, 1.0),
    ],
    ids=str,
)
def test_correlated_inputs_lose_less(options, least):
    assert gain(GPTQ(**options), correlated) >= least


@pytest.mark.parametrize("bits", [4, 8])
def test_white_inputs_lose_nothing(bits):
    assert gain(GPTQ(bits=bits), white) >= 0.9


def test_inputs_that_are_always_zero_are_rounded_to_the_nearest():
    x, w = correlated(512, seed=2), weight()
    x[:, 5] = x[:, 77] = 0.0
    found, nearest = fitted(w, x, GPTQ(bits=4)), GPTQ(bits=4).nearest(w)
    assert torch.equal(found.codes[:, [5, 77]], nearest.codes[:, [5, 77]])
    assert torch.equal(fitted(w, torch.zeros_like(x), GPTQ(bits=4)).codes, nearest.codes)
    errors = output_errors(w, (found, nearest), (x.T @ x).double())
    assert errors[0] < errors[1]


def test_fewer_rows_than_inputs_are_enough_to_go_on():
    found = fitted(weight(), correlated(3, seed=2), GPTQ(bits=4))
    assert torch.isfinite(found.values()).all() and found.codes.abs().max() <= 7


def test_a_matrix_that_is_not_quite_definite_is_damped_more():
    gram = torch.ones(WIDTH, WIDTH, dtype=torch.float64) - 0.1 * torch.eye(WIDTH, dtype=torch.float64)
    made = Curvature.of(gram, 1, damp=1e-3, act_order=False)
    assert torch.isfinite(made.factor).all()
    assert Curvature.of(gram * torch.inf, 1, damp=0.01, act_order=False) is None


def test_the_error_of_codes_is_the_error_of_the_output():
    x, w = correlated(300, seed=4), weight()
    nearest = GPTQ(bits=4).nearest(w)
    expected = (x @ (w - nearest.values()).T).square().sum() / (x @ w.T).square().sum()
    assert output_errors(w, [nearest], (x.T @ x).double()) == [pytest.approx(float(expected), rel=1e-4)]


def test_clipped_scales_lose_less_than_whole_ones():
    w, grid = weight(), Grid(3)
    w[:, 0] = 6.0
    whole, clipped = (fit(grid, w, 64)[0].repeat_interleave(64, -1) for fit in (Grid.fit_rows, clipped_rows))
    errors = [(grid.round_trip(w, scale) - w).abs().pow(2.4).sum() for scale in (whole, clipped)]
    assert errors[1] < 0.9 * errors[0]
    with pytest.raises(ValueError, match="groups of 5"):
        clipped_rows(grid, w, 5)


# -- the pass


def data(make=correlated, count: int = 10, width: int = WIDTH) -> list[dict[str, torch.Tensor]]:
    return [{"x": make(64, seed, width).reshape(2, 32, width)} for seed in range(count)]


def layer(outputs: int = 64, stored: Program | None = None):
    """One linear layer; with the codes of ``stored`` where given."""

    def emit(build, x, mask):
        w, bias = weight(outputs), build.parameter("b", torch.ones(outputs))
        if stored is None:
            return {"y": build.linear(x, build.parameter("w", w), bias, site="layer")}
        codes, scale = (stored.parameters[f"w.{part}"].tensor for part in ("codes", "scale"))
        decoded = build.dequantize(build.parameter("c", codes), build.parameter("s", scale), axis=0)
        return {"y": build.linear(x, decoded, bias, site="layer")}

    return program(emit, width=WIDTH)


def table():
    """A weight that is read as a table, too."""

    def emit(build, x, mask):
        rows = Weights(build)("table", WIDTH, WIDTH)
        return {"y": build.linear(build.embedding(build.argmax(x, dim=-1), rows), rows, site="head")}

    return program(emit, width=WIDTH)


def findings(pass_, made: Program, calibration, **options):
    _, report = Pipeline([pass_]).run(made, Context(**options), calibration=calibration)
    return report.steps[0].changes


def test_weights_are_stored_as_by_rounding_to_the_nearest():
    after = apply(GPTQ(bits=4), layer(), data())
    check_pass(GPTQ(bits=4), layer(), layer(stored=after), unmatched=table(), calibration=data())
    nearest = apply(RoundToNearest(bits=4), layer())
    assert torch.equal(after.parameters["w.scale"].tensor, nearest.parameters["w.scale"].tensor)
    assert not torch.equal(after.parameters["w.codes"].tensor, nearest.parameters["w.codes"].tensor)


@pytest.mark.parametrize("options", [{"group": 32}, {"act_order": True}, {"clip": True}], ids=str)
def test_every_form_keeps_the_protocol(options):
    check_pass(GPTQ(bits=4, **options), layer(), None, unmatched=table(), calibration=data())


def test_both_errors_are_in_the_report():
    (found,) = findings(GPTQ(bits=4), layer(), data())
    assert found.reason == "weights in 4 bits per row, fitted to data"
    assert 1.35**2 * found.figures["error_gptq"] < found.figures["error_nearest"]
    assert found.figures["tokens_per_input"] == 8 * 64 / WIDTH


def test_codes_that_lose_more_on_held_out_data_are_not_kept():
    # one direction to fit to, and others to be judged by
    only = torch.zeros(64, WIDTH)
    only[:, :2] = torch.ones(64, 2)
    batches = [{"x": only.reshape(2, 32, WIDTH)} for _ in range(4)] + [
        {"x": white(64, 3).reshape(2, 32, WIDTH)}
    ]
    made = layer()
    (found,) = findings(GPTQ(bits=2, damp=1e-6), made, Calibration(batches))
    assert found.reason.endswith("to the nearest, which loses less on held-out data")
    assert found.figures["error_gptq"] > found.figures["error_nearest"]
    after, _ = Pipeline([GPTQ(bits=2, damp=1e-6)]).run(made, calibration=batches)
    assert torch.equal(after.parameters["w.codes"].tensor, GPTQ(bits=2).nearest(weight()).codes)


@pytest.mark.parametrize("form", [{}, {"post_norm": True}, {"gated": True, "rms": True, "kv_heads": 2}])
def test_a_model_goes_block_by_block(form):
    made = Transformer(layers=2, mask=None, **form).build()
    batches = data(width=16)
    after, report = Pipeline([GPTQ(bits=4)]).run(made, calibration=batches)
    linears = made.main.calls("linear")
    assert [c.site for c in report.steps[0].changes] == [n.meta["site"] for n in linears]
    assert len(after.main.calls("dequantize")) == len(linears)
    assert all(c.figures for c in report.steps[0].changes)


def test_later_blocks_see_the_earlier_ones_quantized():
    made = Transformer(layers=2, mask=None).build()
    first, later = "block.0.*", "block.1.ffn.up"
    (alone,) = findings(GPTQ(bits=2, only=later), made, data(width=16))
    together = findings(GPTQ(bits=2, only=(first, later)), made, data(width=16))[-1]
    assert together.site == alone.site and together.figures["error_nearest"] != alone.figures["error_nearest"]


def test_layers_that_no_data_reaches_are_rounded_to_the_nearest():
    made = layer()
    second = made.add_function("second", made.main.dims)
    x = second.add_input("x", made.main.inputs["x"])
    build = second.builder()
    other = build.parameter("other", weight(8))
    second.set_outputs(
        {"y": build.linear(x, build.read("w"), site="shared"), "z": build.linear(x, other, site="other")}
    )
    after, report = Pipeline([GPTQ(bits=4)]).run(made, calibration=data())
    reasons = {c.site: c.reason.partition(", ")[2] for c in report.steps[0].changes}
    unreached = "to the nearest: no calibration data reaches its input"
    assert reasons == {"layer": "fitted to data", "shared": "fitted to data", "other": unreached}
    assert sorted(after.parameters) == ["b", "other.codes", "other.scale", "w.codes", "w.scale"]


def test_orders_that_cannot_be_stored_are_refused():
    with pytest.raises(PipelineError, match="needs static_groups"):
        GPTQ(group=32, act_order=True)
    for options in ({"damp": 0.0}, {"block": 0}, {"bits": 9}):
        with pytest.raises(PipelineError, match="configuration"):
            GPTQ(**options)
