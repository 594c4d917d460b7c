"""Recovery: what lossy passes took from the mean of outputs comes back, and nothing is paid for it elsewhere."""

from __future__ import annotations

import pytest
import torch

from tersor.ir import Program, run
from tersor.passes import Context, Equivalent, Lossy, Pass, PassResult, Pipeline
from tersor.passes.quantize.grid import Grid
from tersor.passes.recover.bias import BiasCorrection
from tersor.passes.recover.reference import counterparts
from tests.passes.check_pass import check_pass
from tests.passes.programs import Transformer, Weights, program

WIDTH = 64


def batches(mean: float, count: int = 10, width: int = WIDTH) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(11)
    centre = mean * torch.randn(width, generator=generator)
    return [{"x": centre + torch.randn(2, 32, width, generator=generator)} for _ in range(count)]


def layer(*, bits: int | None = None, bias: bool = True, shift: torch.Tensor | None = None) -> Program:
    """One linear layer, its weight in codes where bits are given, the bias moved by ``shift``."""

    def emit(build, x, mask):
        weight, start = Weights(build).tensor(32, WIDTH), Weights(build, 1).tensor(32)
        if bits is None:
            stored = build.parameter("w", weight)
        else:
            scale, _ = Grid(bits).fit_rows(weight)
            codes = Grid(bits).codes(weight, scale[:, None]).to(torch.int8)
            stored = build.dequantize(build.parameter("c", codes), build.parameter("s", scale), axis=0)
        start = start if bias else torch.zeros(32)
        operands = [build.parameter("b", start if shift is None else start + shift)]
        return {"y": build.linear(x, stored, *(operands if bias or shift is not None else ()), site="layer")}

    return program(emit, width=WIDTH)


def output(made: Program, data) -> torch.Tensor:
    return torch.cat([run(made.main, batch)["y"].flatten(0, 1) for batch in data]).double()


def error(reference: Program, made: Program, data) -> float:
    return float((output(reference, data) - output(made, data)).square().mean())


def recover(made: Program, reference: Program, data, **options):
    after, report = Pipeline([BiasCorrection(**options)]).run(
        made, Context(reference=reference), calibration=data
    )
    return after, report.steps[0]


# -- biases


@pytest.mark.parametrize("bias", [True, False])
def test_a_bias_takes_up_the_mean_error(bias):
    data = batches(3.0)
    reference, quantized = layer(bias=bias), layer(bits=4, bias=bias)
    fit = [batch for i, batch in enumerate(data) if i not in (4, 9)]
    before = output(reference, fit)
    weights = 1 / before.square().sum(1, keepdim=True)
    shift = ((before - output(quantized, fit)) * weights).sum(0).float() / weights.sum()
    check_pass(
        BiasCorrection(),
        quantized,
        layer(bits=4, bias=bias, shift=shift),
        unmatched=reference,
        calibration=data,
        reference=reference,
    )


def test_most_of_the_error_of_inputs_with_a_mean_goes():
    reference, quantized = layer(), layer(bits=4)
    after, step = recover(quantized, reference, batches(3.0))
    fresh = batches(3.0, count=20)[10:]
    # the mean of the inputs holds 9 of 10 parts of their energy
    assert error(reference, after, fresh) < 0.2 * error(reference, quantized, fresh)
    (found,) = step.changes
    assert found.figures["error_after"] < 0.2 * found.figures["error_before"]


def test_a_few_tokens_of_large_values_do_not_decide_for_all():
    def with_outliers(data):
        for batch in data:
            batch["x"][:, 0] *= -300.0
        return data

    reference, quantized = layer(), layer(bits=4)
    after, _ = recover(quantized, reference, with_outliers(batches(3.0)))
    usual = batches(3.0, count=20)[10:]
    assert error(reference, after, usual) < 0.25 * error(reference, quantized, usual)


def test_inputs_without_a_mean_lose_nothing():
    reference, quantized = layer(), layer(bits=4)
    after, _ = recover(quantized, reference, batches(0.0))
    fresh = batches(0.0, count=20)[10:]
    assert error(reference, after, fresh) <= error(reference, quantized, fresh) / 0.9


def test_what_held_out_data_contradicts_is_not_kept():
    fit, other = batches(3.0, count=4), [{"x": -b["x"]} for b in batches(3.0, count=1)]
    after, step = recover(made := layer(bits=4), layer(), fit + other)
    (left,) = step.skips
    assert after is made and left.reason == "its outputs would not be nearer on held-out data"
    assert left.figures["error_after"] > left.figures["error_before"]


def test_places_that_cannot_be_corrected_say_why():
    def reasons(made, reference, **options):
        return [skip.reason for skip in recover(made, reference, batches(1.0), **options)[1].skips]

    assert reasons(layer(), layer()) == ["its weights are not in codes"]
    other = layer()
    other.main.calls("linear")[0].meta["site"] = "elsewhere"
    assert reasons(layer(bits=4), other) == ["no earlier version of it is known"]

    def computed(build, x, mask):
        codes = build.parameter("c", torch.ones(WIDTH, WIDTH, dtype=torch.int8))
        weight = build.dequantize(codes, build.parameter("s", torch.ones(WIDTH)), axis=0)
        bias = build.mul(build.parameter("b", torch.ones(WIDTH)), 2.0)
        return {"y": build.linear(x, weight, bias, site="layer")}

    made = program(computed, width=WIDTH)
    assert reasons(made, made) == ["its bias is computed"]


def two_functions(*, own_bias: bool = False) -> Program:
    """``main`` and a second function with a layer of the same weights."""
    made = layer(bits=4)
    second = made.add_function("second", made.main.dims)
    x, build = second.add_input("x", made.main.inputs["x"]), second.builder()
    weight = build.dequantize(build.read("c"), build.read("s"), axis=0)
    bias = build.parameter("own", torch.ones(32)) if own_bias else build.read("b")
    second.set_outputs({"y": build.linear(x, weight, bias, site="again")})
    return made


def test_functions_that_share_a_layer_share_its_bias():
    after, step = recover(two_functions(), layer(), batches(3.0))
    names = {f.calls("linear")[0].args[2].target for f in after.functions.values()}
    assert len(names) == 1 and [c.site for c in step.changes] == ["layer"] and "b" not in after.parameters
    for made, options in ((two_functions(own_bias=True), {}), (two_functions(), {"skip": "again"})):
        after, step = recover(made, layer(), batches(3.0), **options)
        assert after is made
        assert step.skips[0].reason == "layers of other functions with its weights cannot change along"


# -- in a pipeline


def means(made: Program, site: str, data) -> torch.Tensor:
    """The mean output of a layer."""
    (node,) = [n for n in made.main.calls("linear") if n.meta["site"] == site]
    seen = []
    for batch in data:
        run(made.main, batch, observe=lambda n, value: seen.append(value) if n is node else None)
    return torch.cat([value.flatten(0, 1) for value in seen]).double().mean(0)


QUANTIZED = ["smooth.smoothquant", {"pass": "quantize.rtn", "bits": 4}, "quantize.static"]


def test_every_layer_gets_its_mean_back():
    made, data = Transformer(layers=2, mask=None).build(), batches(0.5, width=16)
    smooth, _ = Pipeline(QUANTIZED[:1]).run(made, calibration=data)
    plain, _ = Pipeline(QUANTIZED).run(made, calibration=data)
    after, report = Pipeline([*QUANTIZED, "recover.bias"]).run(made, calibration=data)
    assert len(report.steps[-1].changes) >= 8
    for found in report.steps[-1].changes:
        # against the smoothed program: values between layers are scaled in it
        wanted = means(smooth, found.site, data)
        moved = [(means(p, found.site, data) - wanted).norm() for p in (plain, after)]
        assert moved[1] < 0.6 * moved[0], found.site


def test_corrected_layers_become_integer_products():
    made, data = Transformer(layers=1, mask=None).build(), batches(0.5, width=16)
    after, _ = Pipeline([*QUANTIZED, "recover.bias", "quantize.integers"]).run(made, calibration=data)
    assert not after.main.calls("linear")


class Halve(Pass):
    """Halves the first weight, and says of itself what it is told to."""

    def run(self, program, context):
        result, node = PassResult(), program.main.calls("linear")[0]
        program.parameters[node.args[1].target] = program.main.parameter(node.args[1]) * 0.5
        result.change(node, "halved")
        return result


class Look(Pass):
    """Keeps what it is given to recover."""

    recovers = True
    seen = []

    def run(self, program, context):
        self.seen.append(context.reference)
        return PassResult()


def test_the_reference_is_the_program_since_which_all_was_lossy():
    class Scale(Halve):
        numerics = Equivalent(1e9)

    Look.seen.clear()
    made = Transformer(layers=1).build()
    Pipeline([Halve(), Look(), Scale(), Look(), Halve(), Halve(), Look()]).run(made)
    weight = made.main.calls("linear")[0].args[1].target
    found = [p.parameters[weight].tensor / made.parameters[weight].tensor for p in Look.seen]
    assert [round(float(f.mean()), 3) for f in found] == [1.0, 0.25, 0.25]
    assert isinstance(Halve.numerics, Lossy)


def test_passes_that_do_not_recover_see_no_reference():
    seen = []

    class Blind(Pass):
        def run(self, program, context):
            seen.append(context.reference)
            return PassResult()

    made = Transformer(layers=1).build()
    Pipeline([Blind()]).run(made, Context(reference=made))
    assert seen == [None]


def test_another_reference_is_another_result(tmp_path):
    made, data = layer(bits=4), batches(3.0)
    for reference, cached in ((layer(), False), (layer(), True), (layer(shift=torch.ones(32)), False)):
        context = Context(cache=tmp_path, reference=reference)
        _, report = Pipeline(["recover.bias"]).run(made, context, calibration=data)
        assert report.steps[0].cached == cached


def test_counterparts_have_the_same_site_and_shape():
    made, other = Transformer(layers=1).build(), Transformer(layers=1, neurons=20).build()
    found = counterparts(made, other, "linear")
    sites = {node.meta["site"] for node in found}
    assert sites == {n.meta["site"] for n in made.main.calls("linear")} - {"block.0.ffn.up"}
    assert all(node.meta["site"] == partner.meta["site"] for node, partner in found.items())
