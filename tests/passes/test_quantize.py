"""Weights and activations in codes, and integer products of them."""

from __future__ import annotations

import pytest
import torch

from tersor.errors import PipelineError
from tersor.ir import Program
from tersor.ir.matching import is_call
from tersor.passes import Context, Pipeline
from tersor.passes.calibration import Histogram, MinMax
from tersor.passes.numerics import outputs, relative_error, small_inputs
from tersor.passes.quantize.bf16 import BFloat16
from tersor.passes.quantize.dynamic import DynamicActivations
from tersor.passes.quantize.fp16 import Float16
from tersor.passes.quantize.grid import Grid, group_size
from tersor.passes.quantize.integers import IntegerProducts
from tersor.passes.quantize.ranges import choose_range, rounding_error
from tersor.passes.quantize.rtn import RoundToNearest
from tersor.passes.quantize.static import StaticActivations
from tests.ir import stateful
from tests.passes.check_pass import apply, check_pass
from tests.passes.programs import Transformer, Weights, program

WIDTH = 16
SCALE, ZERO = 0.03, 117


def layer(*, weights: bool = False, inputs: str = "", integer: bool = False, group: int | None = None):
    """One linear layer with what the passes make of it."""

    def emit(build, x, mask):
        weight, bias = Weights(build).tensor(8, WIDTH), Weights(build, 1).tensor(8)
        scale, _ = Grid().fit_rows(weight, group)
        spread = scale[:, None] if group is None else scale.repeat_interleave(group, -1)
        codes = torch.round(weight / spread).to(torch.int8)
        zero = ZERO if inputs == "static" else 128
        if weights:
            form = {"axis": 0} if group is None else {"group": group}
            stored = build.dequantize(build.parameter("c", codes), build.parameter("ws", scale), **form)
        elif not integer:
            stored = build.parameter("w", weight)
        step = codes_of_x = None
        if inputs:
            step = build.parameter("s", torch.tensor(SCALE)) if inputs == "static" else build.dynamic_scale(x)
            codes_of_x = build.quantize(x, step, zero, dtype="uint8")
            x = codes_of_x if integer else build.dequantize(codes_of_x, step, zero)
        if integer:
            start = -zero * codes.to(torch.int64).sum(1)
            if inputs == "static":
                start = start + torch.round(bias.double() / (SCALE * scale.double())).to(torch.int64)
            start = build.parameter("k", start.to(torch.int32))
            product = build.emit("integer_linear", x, build.parameter("c", codes), start, site="layer")
            sums = build.cast(product, dtype="float32")
            if inputs == "static":
                return {"y": build.mul(sums, build.parameter("m", SCALE * scale))}
            y = build.mul(build.mul(sums, build.parameter("ws", scale)), step)
            return {"y": build.add(y, build.parameter("b", bias))}
        return {"y": build.linear(x, stored, build.parameter("b", bias), site="layer")}

    return program(emit)


def reasons(pass_, made: Program) -> list[str]:
    _, report = Pipeline([pass_]).run(made)
    return [skip.reason for skip in report.steps[0].skips]


def error(made: Program, other: Program) -> float:
    inputs = small_inputs(made, seed=3)
    return relative_error(outputs(made, inputs), outputs(other, inputs))


# -- grids


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_values_inside_the_range_move_by_half_a_step_and_zero_not_at_all(bits, symmetric):
    grid, x = Grid(bits, symmetric), torch.randn(1000, generator=torch.Generator().manual_seed(0)) + 0.7
    scale, zero = grid.fit(x.min(), x.max())
    back = grid.round_trip(x, scale, zero)
    # an asymmetric zero point is rounded, which costs the end of the range up to half a step more
    assert ((x - back).abs() <= scale * (0.5001 if symmetric else 1.0001)).all()
    assert grid.round_trip(torch.zeros(1), scale, zero) == 0
    assert grid.low <= grid.codes(x, scale, zero).min() and grid.codes(x, scale, zero).max() <= grid.high


@pytest.mark.parametrize("value", [0.0, 2.5, -2.5])
def test_constant_values_have_a_grid(value):
    for symmetric in (True, False):
        x = torch.full((4,), value)
        scale, zero = Grid(8, symmetric).fit(x.min(), x.max())
        assert scale > 0
        torch.testing.assert_close(Grid(8, symmetric).round_trip(x, scale, zero), x)


def test_a_bit_is_worth_six_decibels():
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0)).clamp(-4, 4)
    for bits in (4, 6, 8):
        noise = x - Grid(bits).round_trip(x, *Grid(bits).fit(x.min(), x.max()))
        # errors are uniform over a step, of which there are 2^(bits-1) - 1 up to 4
        expected = 10 * torch.log10(torch.tensor(12 * (Grid(bits).high / 4) ** 2))
        assert abs(10 * torch.log10(x.square().mean() / noise.square().mean()) - expected) < 0.3


def test_groups_that_do_not_divide_the_rows_are_refused():
    with pytest.raises(ValueError, match="groups of 5"):
        Grid().fit_rows(torch.ones(2, 12), 5)


# -- weights


@pytest.mark.parametrize("group", [None, 4])
def test_weights_become_codes(group):
    check_pass(
        RoundToNearest(group=group),
        layer(),
        layer(weights=True, group=group),
        unmatched=layer(weights=True),
    )


def test_weights_keep_half_a_step():
    before = layer()
    after = apply(RoundToNearest(), before)
    codes = after.parameters["w.codes"].tensor.float()
    scale = after.parameters["w.scale"].tensor
    moved = (codes * scale[:, None] - before.parameters["w"].tensor).abs()
    assert (moved <= scale[:, None] * 0.5001).all() and "w" not in after.parameters


def test_a_table_of_embeddings_stays_wide():
    def emit(build, x, mask):
        table = Weights(build)("table", 16, WIDTH)
        ids = build.argmax(x, dim=-1)
        return {"y": build.linear(build.embedding(ids, table), table, site="head")}

    assert reasons(RoundToNearest(), program(emit)) == ["its weight is also read by embedding"]


def test_groups_that_do_not_fit_are_skipped():
    assert "groups of 5" in reasons(RoundToNearest(group=5), layer())[0]


# -- activations


def test_activations_get_a_scale_per_token():
    check_pass(
        DynamicActivations(), layer(weights=True), layer(weights=True, inputs="dynamic"), unmatched=layer()
    )


def test_layers_of_one_input_share_its_codes():
    made, _ = Pipeline([RoundToNearest(), DynamicActivations()]).run(Transformer(layers=1).build())
    # query, key and value read one norm
    assert len(made.main.calls("linear")) == 6 and len(made.main.calls("quantize")) == 4


@pytest.mark.parametrize(
    ("channels", "most", "size"),
    [
        (576, 128, 96), (1536, 128, 128), (768, 256, 256), (144, 100, 48), (80, 20, 16), (160, 128, 80),
        (128, 128, None), (100, 64, None), (576, None, None), (592, 128, None), (64 * 17, 128, 64), (32 * 37, 128, 32),
    ],
)  # fmt: skip
def test_groups_divide_the_channels(channels, most, size):
    assert group_size(channels, most) == size


@pytest.mark.parametrize("group", [15, 0, -128])
def test_groups_that_are_too_small_are_refused(group):
    with pytest.raises(PipelineError, match="at least 16"):
        DynamicActivations(group=group)


def wide_layer(channels: int) -> Program:
    def emit(build, x, mask):
        weight, bias = Weights(build).tensor(24, channels), Weights(build, 1).tensor(24)
        return {"y": build.linear(x, build.parameter("w", weight), build.parameter("b", bias), site="layer")}

    return program(emit, width=channels)


def loss(channels: int, group: int | None, outlier: float) -> float:
    """The mean square error of a layer with 8-bit inputs, of which one channel is so much wider than the others."""
    exact, _ = Pipeline([RoundToNearest()]).run(wide_layer(channels))
    rounded, _ = Pipeline([DynamicActivations(group=group)]).run(exact)
    x = torch.randn(4, 32, channels, generator=torch.Generator().manual_seed(0))
    x[..., channels // 2] = outlier
    return (rounded(x=x)["y"] - exact(x=x)["y"]).square().mean().item()


def test_a_group_keeps_what_an_outlier_costs_to_itself():
    """The fewer channels share its scale, the less is lost; without one, nothing is."""
    assert loss(512, None, 100.0) > 3.5 * loss(512, 128, 100.0)
    assert loss(512, None, 100.0) > 7 * loss(512, 64, 100.0)
    assert loss(512, None, 1.0) > loss(512, 128, 1.0)


# -- activations, from data


def data(width: int = WIDTH, scale: float = 1.0) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(7)
    return [{"x": scale * torch.randn(2, 20, width, generator=generator)} for _ in range(6)]


def static_scale(made: Program, calibration, **options) -> tuple[float, float]:
    """Scale and zero point that the pass gives the first layer's input."""
    after, _ = Pipeline([StaticActivations(**options)]).run(made, calibration=calibration)
    _, scale, zero = after.main.calls("quantize")[0].args
    return float(after.main.parameter(scale)), float(after.main.parameter(zero))


def test_activations_get_one_scale_from_data():
    check_pass(
        StaticActivations(method="minmax"),
        layer(weights=True),
        None,
        unmatched=layer(),
        calibration=data(),
    )
    rows = torch.cat([batch["x"] for batch in data()])
    fit, held_out = rows[: len(rows) - 4], rows  # whichever split: the range lies between theirs
    scale, zero = static_scale(layer(weights=True), data(), method="minmax")
    reach = scale * 255
    assert (fit.max() - fit.min()) * 0.7 < reach <= (held_out.max() - held_out.min()) * 1.001
    assert abs(zero * scale - (-rows.min())) < 0.3 * reach


def test_a_range_search_gives_up_rare_values():
    generator, grid = torch.Generator().manual_seed(0), Grid(8, symmetric=False)
    x = torch.randn(500_000, 1, generator=generator)
    x[0] = 9.0
    extent, histogram = MinMax(), Histogram()
    for statistic in (extent, histogram):
        statistic.update(x, generator)

    def loss(method: str) -> tuple[float, float]:
        scale, zero = choose_range(method, grid, extent, histogram, 0.99)
        return float(scale), float((grid.round_trip(x, scale, zero) - x).square().mean())

    (wide, wide_loss), (least, least_loss), (clipped, clipped_loss) = map(
        loss, ("minmax", "mse", "percentile")
    )
    assert clipped < least < 0.8 * wide and least_loss < 0.8 * wide_loss and least_loss < clipped_loss


def test_without_data_the_pass_names_a_recipe_that_needs_none():
    with pytest.raises(PipelineError, match="int8-dynamic"):
        Pipeline([StaticActivations()]).run(layer(weights=True))


def test_zero_is_a_code_of_one_sided_data():
    positive = [{"x": batch["x"].abs() + 1.0} for batch in data()]
    scale, zero = static_scale(layer(weights=True), positive)
    assert zero == 0 and scale > 0


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_constant_data_gives_no_range_and_the_reason_is_told(value):
    constant = [{"x": torch.full((2, 20, WIDTH), value)} for _ in range(4)]
    after, report = Pipeline([StaticActivations()]).run(layer(weights=True), calibration=constant)
    assert not after.main.calls("quantize")
    (skip,) = report.step("quantize.static").skips
    assert skip.reason == "its input is the same for all calibration data"


def spiky(rows: int = 20) -> list[dict[str, torch.Tensor]]:
    """Every tenth token is a thousand times larger: one scale for all leaves the others no codes."""
    made = [{"x": torch.randn(2, rows, WIDTH, generator=torch.Generator().manual_seed(i))} for i in range(6)]
    for batch in made:
        batch["x"][:, ::10] *= 1000
    return made


def two_layers_of_one_input() -> Program:
    def emit(build, x, mask):
        make = Weights(build)
        return {name: make.linear(x, name, 8, WIDTH) for name in ("y", "z")}

    return program(emit)


@pytest.mark.parametrize(("calibration", "static"), [(spiky(), False), (data(), True)])
def test_what_one_scale_would_lose_too_much_of_is_left_to_scales_per_token(calibration, static):
    steps = [RoundToNearest(), StaticActivations(largest_error=2e-3), DynamicActivations()]
    after, report = Pipeline(steps).run(two_layers_of_one_input(), calibration=calibration)
    assert bool(after.main.calls("dynamic_scale")) != static and len(after.main.calls("quantize")) == 1
    assert {skip.site for skip in report.steps[1].skips} == (set() if static else {"y", "z"})
    assert all(skip.figures["output_error"] > 0 for skip in report.steps[1].skips)
    always, _ = Pipeline([steps[0], StaticActivations()]).run(
        two_layers_of_one_input(), calibration=calibration
    )
    assert not always.main.calls("dynamic_scale")


@pytest.mark.parametrize("options", [{"largest_error": 0.0}, {"percentile": 0.4}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(PipelineError):
        StaticActivations(**options)


def test_a_step_of_a_decoder_has_the_scales_of_its_prefill():
    """Also behind the factors that smoothing has put into both."""
    made, generator = stateful.decoder(functions=("prefill", "decode")), torch.Generator().manual_seed(0)
    spread = torch.logspace(-1, 1, stateful.WIDTH)
    batches = [
        {"x": torch.randn(1, 7, stateful.WIDTH, generator=generator) * spread, "position": torch.tensor(0)}
        for _ in range(5)
    ]
    steps = ["smooth.smoothquant", "quantize.rtn", "quantize.static"]
    after, report = Pipeline(steps).run(made, calibration=batches)
    prefill, decode = (
        [after.parameters[quantize.args[1].target].tensor for quantize in function.calls("quantize")]
        for function in after.functions.values()
    )
    assert len(prefill) == len(after.functions["decode"].calls("quantize")) > 1
    assert all(map(torch.equal, prefill, decode))
    assert len(report.step("smooth.smoothquant").changes) == 2
    assert len(report.step("quantize.static").changes) == len(made.functions["prefill"].calls("linear")) * 2


# -- integers


@pytest.mark.parametrize("inputs", ["static", "dynamic"])
def test_decoded_layers_become_integer_products(inputs):
    quantized = layer(weights=True, inputs=inputs)
    after = check_pass(
        IntegerProducts(), quantized, layer(inputs=inputs, integer=True), unmatched=layer(weights=True)
    )
    # the bias is rounded to whole steps of the sums
    assert error(quantized, after) < 1e-4


def test_what_integers_cannot_do_is_said():
    assert reasons(IntegerProducts(), layer(weights=True)) == ["its input is not in codes"]
    assert reasons(IntegerProducts(), layer(inputs="static")) == ["its weights are not in codes"]
    grouped = layer(weights=True, inputs="dynamic", group=4)
    assert reasons(IntegerProducts(), grouped) == ["its weights do not have one scale per row"]
    assert reasons(IntegerProducts(), layer()) == ["it is not quantized"]


def test_groups_become_sums_that_are_scaled_one_by_one():
    made = wide_layer(160)
    decoded, report = Pipeline([RoundToNearest(), DynamicActivations(group=64)]).run(made)
    assert "a scale per token and 32 channels" in str(report.steps[1].changes[0])
    integer, report = Pipeline([IntegerProducts()]).run(decoded)
    assert [change.site for change in report.steps[0].changes] == ["layer"]
    (product,) = integer.main.calls("grouped_integer_linear")
    assert product.args[2].meta["value"].shape[-1] == 5 and not integer.main.calls("linear", "dequantize")
    assert error(decoded, integer) < 1e-6
    assert error(made, integer) < 0.02


@pytest.mark.parametrize(
    ("point", "points", "reason"),
    [(117, None, "another zero point than 128"), (128, 3.0, "its weights zero points")],
)
def test_groups_that_are_no_symmetric_codes_stay_decoded(point, points, reason):
    def emit(build, x, mask):
        scale = build.dynamic_scale(x, group=16)
        codes = build.quantize(x, scale, point, dtype="uint8", group=16)
        weight = build.parameter("c", torch.randint(-128, 128, (8, 64), dtype=torch.int8))
        weight = build.dequantize(weight, build.parameter("ws", torch.ones(8)), points, axis=0)
        return {"y": build.linear(build.dequantize(codes, scale, point, group=16), weight, site="layer")}

    (said,) = reasons(IntegerProducts(), program(emit, width=64))
    assert reason in said


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
def test_codes_that_are_moved_before_they_are_decoded_stay_as_they_are(dtype):
    def emit(build, x, mask):
        step = build.parameter("s", torch.tensor(SCALE))
        moved = build.permute(build.quantize(x, step, 3, dtype=dtype), dims=(0, 2, 1))
        return {"y": build.dequantize(moved, step, 3)}

    made = program(emit)
    after, _ = Pipeline([IntegerProducts()]).run(made)
    assert after.digest() == made.digest()


def test_sums_that_could_overflow_stay_decoded():
    def emit(build, x, mask):
        wide = build.expand(build.slice(x, dim=2, end=1), shape=(*x.meta["value"].shape[:2], 70_000))
        step = build.parameter("s", torch.tensor(SCALE))
        decoded = build.dequantize(build.quantize(wide, step, 0, dtype="uint8"), step, 0)
        codes = build.parameter("c", torch.full((2, 70_000), 127, dtype=torch.int8))
        weight = build.dequantize(codes, build.parameter("ws", torch.ones(2)), axis=0)
        return {"y": build.linear(decoded, weight, site="layer")}

    assert reasons(IntegerProducts(), program(emit)) == ["sums over 70000 inputs could leave int32"]


@pytest.mark.parametrize("point", ["static", "one", "per token"])
@pytest.mark.parametrize("points", [None, 7.0, torch.arange(-4.0, 4.0)], ids=["symmetric", "one", "per row"])
def test_zero_points_are_taken_off_the_sums(points, point):
    """Asymmetric weights, and activations whose zero point is found while the model runs."""

    def emit(build, x, mask):
        zero = float(ZERO)
        per_token = point == "per token"
        scale = build.dynamic_scale(x) if per_token else build.parameter("s", torch.tensor(SCALE))
        if point != "static":
            reach = {"dims": (-1,), "keepdim": True} if per_token else {"dims": (0, 1, 2)}
            zero = build.round(build.add(build.mul(build.amax(x, **reach), 20.0), 90.0))
        decoded = build.dequantize(build.quantize(x, scale, zero, dtype="uint8"), scale, zero)
        codes = build.parameter("c", torch.randint(-128, 128, (8, WIDTH), dtype=torch.int8))
        weights = [codes, build.parameter("ws", torch.linspace(0.01, 0.02, 8))]
        weights += [build.parameter("wz", points) if isinstance(points, torch.Tensor) else points]
        weight = build.dequantize(*weights, axis=0)
        return {
            name: build.linear(decoded, weight, build.parameter(name, torch.ones(8)), site=name)
            for name in ("y", "z")
        }

    torch.manual_seed(0)
    quantized = program(emit)
    after = apply(IntegerProducts(), quantized)
    assert error(quantized, after) < (2e-4 if point == "static" else 1e-5)
    sums = [n for n in after.main.calls("integer_linear") if n.meta["value"].shape[-1] == 1]
    assert len(sums) == (points is not None), "both layers read the sums of their codes"


@pytest.mark.parametrize(
    ("low", "read_twice", "joins"), [(0.5, False, True), (-0.5, False, False), (0.5, True, False)]
)
def test_factors_of_columns_become_part_of_the_scale(low, read_twice, joins):
    """Positive ones, where the codes are only multiplied."""
    factor = torch.linspace(low, 2.0, WIDTH)

    def emit(build, x, mask):
        scaled = build.mul(build.gelu(x), build.parameter("f", factor))
        step = build.parameter("s", torch.tensor(SCALE))
        decoded = build.dequantize(build.quantize(scaled, step, float(ZERO), dtype="uint8"), step, ZERO)
        codes = build.parameter("c", torch.randint(-127, 128, (8, WIDTH), dtype=torch.int8))
        weight = build.dequantize(codes, build.parameter("ws", torch.linspace(0.01, 0.02, 8)), axis=0)
        outputs = {"y": build.linear(decoded, weight, site="layer")}
        return {**outputs, "z": build.relu(decoded)} if read_twice else outputs

    torch.manual_seed(0)
    quantized = program(emit)
    after = apply(IntegerProducts(), quantized)
    (encoding,) = after.main.calls("quantize")
    if joins:
        assert is_call(encoding.args[0], "gelu") and encoding.kwargs["axis"] == -1
        torch.testing.assert_close(after.main.parameter(encoding.args[1]), SCALE / factor)
    else:
        assert is_call(encoding.args[0], "mul") and "axis" not in encoding.kwargs
    assert error(quantized, after) < 1e-3


@pytest.mark.parametrize(
    "form", [{}, {"post_norm": True}, {"gated": True, "rms": True, "kv_heads": 2, "bias": False}]
)
def test_a_model_in_integers_is_the_decoded_model(form):
    made = Transformer(**form).build()
    decoded, _ = Pipeline([RoundToNearest(), DynamicActivations()]).run(made)
    integer, report = Pipeline([IntegerProducts()]).run(decoded)
    assert not integer.main.calls("linear", "dequantize")
    assert len(report.steps[0].changes) == len(made.main.calls("linear"))
    # a sum rounded otherwise may move a code by one
    assert error(decoded, integer) < 0.02 and error(made, integer) < 0.05


# -- bf16


def narrow_layer(narrow: bool) -> Program:
    """One linear layer of f32, or of bf16 values widened to f32."""

    def emit(build, x, mask):
        weight, bias = Weights(build).tensor(8, WIDTH), build.parameter("b", Weights(build, 1).tensor(8))
        if not narrow:
            return {"y": build.linear(x, build.parameter("w", weight), bias, site="layer")}
        x = build.cast(build.cast(x, dtype="bfloat16"), dtype="float32")
        stored = build.cast(build.parameter("w", weight.to(torch.bfloat16)), dtype="float32")
        return {"y": build.linear(x, stored, bias, site="layer")}

    return program(emit)


def test_products_become_bf16():
    before, after = narrow_layer(False), narrow_layer(True)
    check_pass(BFloat16(), before, after, unmatched=layer(weights=True))
    assert 1e-5 < error(before, after) < 0.01


def test_attention_multiplies_bf16_and_layers_of_one_input_share_it():
    made = Transformer(layers=1).build()
    after = apply(BFloat16(), made)
    assert [n.kwargs["products"] for n in after.main.calls("attention")] == ["bfloat16"]
    inputs = {n.args[0] for n in after.main.calls("linear")}
    assert len(inputs) == 4 and len(after.main.calls("linear")) == 6
    only = apply(BFloat16(kinds=("attention",)), made)
    assert not only.main.calls("cast") and only.main.calls("attention")[0].kwargs["products"] == "bfloat16"


# -- fp16


def fp16_layer(narrow: bool, scale: float = 1.0) -> Program:
    """One linear layer of f32 with weights around ``scale``, or of fp16 values widened to f32."""

    def emit(build, x, mask):
        weight, bias = (
            scale * Weights(build).tensor(8, WIDTH),
            build.parameter("b", Weights(build, 1).tensor(8)),
        )
        if not narrow:
            return {"y": build.linear(x, build.parameter("w", weight), bias, site="layer")}
        limited = build.minimum(build.maximum(x, -65504.0), 65504.0)
        x = build.cast(build.cast(limited, dtype="float16"), dtype="float32")
        stored = build.cast(build.parameter("w", weight.to(torch.float16)), dtype="float32")
        return {"y": build.linear(x, stored, bias, site="layer")}

    return program(emit)


def test_products_become_fp16():
    before, after = fp16_layer(False), fp16_layer(True)
    check_pass(Float16(), before, after, unmatched=layer(weights=True))
    assert 1e-6 < error(before, after) < 1e-3


def test_attention_multiplies_fp16_and_layers_of_one_input_share_it():
    made = Transformer(layers=1).build()
    after = apply(Float16(), made)
    assert [n.kwargs["products"] for n in after.main.calls("attention")] == ["float16"]
    assert (
        len({n.args[0] for n in after.main.calls("linear")}) == 4
        and len(after.main.calls("cast")) == 2 * 4 + 6
    )
    narrow = Pipeline([BFloat16(kinds=("attention",)), Float16()]).run(made)[1]
    assert [s.reason for s in narrow.steps[1].skips] == ["its products are in bfloat16 already"]


def test_weights_beyond_fp16_are_left_alone():
    _, report = Pipeline([Float16()]).run(large := fp16_layer(False, scale=1e6))
    (skip,) = report.steps[0].skips
    assert skip.reason == "its weight has values beyond 65504, the largest in fp16"
    assert apply(Float16(), large) is large


def test_inputs_beyond_fp16_are_limited_to_its_range():
    after = apply(Float16(), before := fp16_layer(False))
    x = torch.zeros(2, 8, WIDTH)
    x[0, 0, 0], x[0, 1, 1], x[1, 0, 0] = 1e6, -torch.inf, torch.nan
    mask = torch.ones(2, 1, 1, 8, dtype=torch.bool)
    found = after(x=x, mask=mask)["y"]
    torch.testing.assert_close(
        found[0], before(x=x.clamp(-65504, 65504), mask=mask)["y"][0], rtol=1e-3, atol=10
    )
    assert found[0].isfinite().all() and found[1, 0].isnan().all()


# -- what reports say


def test_reports_have_error_bytes_and_work_of_every_layer():
    made = Transformer(layers=1).build()
    data = [{"x": torch.randn(2, 8, 16), "mask": torch.ones(2, 1, 1, 8, dtype=torch.bool)} for _ in range(3)]
    _, report = Pipeline([RoundToNearest(), StaticActivations()]).run(made, calibration=data)
    weights, inputs = ({c.site: c.figures for c in step.changes} for step in report.steps)
    assert len(weights) == len(inputs) == 6
    up = weights["block.0.ffn.up"]
    rounded = Grid().round_trip(
        weight := made.parameters["block.0.ffn.up.weight"].tensor, Grid().fit_rows(weight)[0][:, None]
    )
    assert up["weight_error"] == pytest.approx(
        ((rounded - weight).square().sum() / weight.square().sum()).item(), rel=1e-3
    )
    assert (up["bytes_before"], up["bytes_after"]) == (4 * 24 * 16, 24 * 16 + 4 * 24)
    # the rest of the work is that of the attention
    assert sum(f["macs_share"] for f in weights.values()) < 1
    assert (
        up["macs_share"]
        == inputs["block.0.ffn.up"]["macs_share"]
        == 1.5 * weights["block.0.attention.key"]["macs_share"]
    )
    assert all(1e-6 < f["input_error"] < 1e-3 for f in inputs.values())
    assert all("latency_share" not in f for f in weights.values())
    times = {site: float(i) for i, site in enumerate(weights)}
    profiled = Context(profile=lambda program: {"": 5.0, **times})
    _, report = Pipeline([RoundToNearest()]).run(made, profiled)
    assert {c.site: c.figures["latency_share"] for c in report.steps[0].changes} == {
        site: time / (5 + 15) for site, time in times.items()
    }


@pytest.mark.parametrize("method", ["minmax", "mse"])
def test_the_error_of_a_range_is_that_of_the_values(method):
    x = torch.randn(4096, 1, generator=torch.Generator().manual_seed(0))
    extent, histogram = MinMax(), Histogram(bins=1 << 16)
    for statistic in (extent, histogram):
        statistic.update(x, torch.Generator())
    for bits in (4, 8):
        grid = Grid(bits, symmetric=False)
        scale, zero = choose_range(method, grid, extent, histogram, 1.0)
        exact = (grid.round_trip(x, scale, zero) - x).square().sum() / x.square().sum()
        assert rounding_error(grid, scale, zero, extent, histogram) == pytest.approx(exact.item(), rel=0.02)


def test_the_error_of_zeros_is_none():
    extent, histogram = MinMax(), Histogram()
    for statistic in (extent, histogram):
        statistic.update(torch.zeros(5, 2), torch.Generator())
    grid = Grid(8, symmetric=False)
    assert rounding_error(grid, *grid.fit(torch.zeros(()), torch.zeros(())), extent, histogram) == 0
