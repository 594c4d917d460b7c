"""Least squares: what kept inputs can say of lost ones comes back, nothing else changes, and nothing is made worse."""

from __future__ import annotations

import pytest
import torch

from tersor.errors import PipelineError
from tersor.ir import Program, run
from tersor.passes import Context, Lossy, Pass, PassResult, Pipeline
from tersor.passes.recover.least_squares import LeastSquares, _Moments
from tests.passes.check_pass import check_pass
from tests.passes.programs import Transformer, program

WIDTH, OUTPUTS = 32, 24


def batches(rank: int = WIDTH, count: int = 10, seed: int = 3) -> list[dict[str, torch.Tensor]]:
    """Inputs around a mean, in a space of ``rank`` directions, the same for every seed."""
    space = torch.Generator().manual_seed(0)
    centre, basis = torch.randn(WIDTH, generator=space), torch.randn(rank, WIDTH, generator=space)
    if rank == WIDTH:
        basis = torch.eye(WIDTH)
    generator = torch.Generator().manual_seed(seed)
    return [{"x": centre + torch.randn(2, 32, rank, generator=generator) @ basis} for _ in range(count)]


def weight() -> torch.Tensor:
    return torch.randn(OUTPUTS, WIDTH, generator=torch.Generator().manual_seed(7))


def layer(w: torch.Tensor | None = None, *, bias: bool = True) -> Program:
    def emit(build, x, mask):
        operands = [build.parameter("w", weight() if w is None else w)]
        if bias:
            operands.append(build.parameter("b", torch.linspace(-1, 1, OUTPUTS)))
        return {"y": build.linear(x, *operands, site="layer")}

    return program(emit, width=WIDTH)


def without_half() -> torch.Tensor:
    """The weight with every second column gone."""
    w = weight()
    w[:, ::2] = 0
    return w


def error(reference: Program, made: Program, data) -> float:
    """|y - y'|^2 / |y - mean|^2."""
    wanted, found = (
        torch.cat([run(p.main, b)["y"].flatten(0, 1) for b in data]).double() for p in (reference, made)
    )
    return float((wanted - found).square().sum() / (wanted - wanted.mean(0)).square().sum())


def recover(made: Program, reference: Program, data, **options):
    context = Context(reference=reference)
    after, report = Pipeline([LeastSquares(**options)]).run(made, context, calibration=data)
    return after, report.steps[0]


# -- planted structure, and none


@pytest.mark.parametrize("bias", [True, False])
def test_a_weight_that_was_disturbed_comes_back(bias):
    reference = layer(bias=bias)
    disturbed = layer(weight() + torch.randn(OUTPUTS, WIDTH), bias=bias)
    after, _ = recover(disturbed, reference, batches(), ridge=1e-7)
    torch.testing.assert_close(after.parameters["w"].tensor, weight(), atol=1e-3, rtol=0)


def test_what_kept_inputs_say_of_lost_ones_comes_back():
    """Half of the inputs are mixtures of the other half; 186 times less error measured, half of that asked for."""
    reference, cut, fresh = layer(), layer(without_half()), batches(WIDTH // 2, seed=9)
    after, step = recover(cut, reference, batches(WIDTH // 2))
    assert error(reference, cut, fresh) > 0.2
    assert error(reference, after, fresh) < error(reference, cut, fresh) / 93
    (found,) = step.changes
    assert found.figures["error_after"] < 0.02 * found.figures["error_before"]
    assert found.figures["tokens_per_input"] == 8 * 64 / WIDTH


def test_independent_inputs_give_back_their_mean_only():
    reference, cut, fresh = layer(), layer(without_half()), batches(seed=9)
    after, _ = recover(cut, reference, batches())
    w = after.parameters["w"].tensor
    assert (w - without_half()).norm() < 0.2 * w.norm()
    means = [
        run(p.main, {"x": mean(batches()).float().expand(1, 1, -1)})["y"] for p in (reference, cut, after)
    ]
    assert (means[0] - means[2]).norm() < 0.2 * (means[0] - means[1]).norm()
    assert error(reference, after, fresh) < error(reference, cut, fresh)


def mean(data) -> torch.Tensor:
    return torch.cat([b["x"].flatten(0, 1) for b in data]).double().mean(0)


def test_without_structure_and_without_a_mean_nothing_is_lost():
    def centred(seed):
        return [{"x": b["x"] - mean(batches(count=200)).float()} for b in batches(seed=seed)]

    reference, cut = layer(), layer(without_half())
    after, _ = recover(cut, reference, centred(3))
    assert error(reference, after, centred(9)) <= error(reference, cut, centred(9)) / 0.9


def test_few_tokens_ask_for_a_strong_ridge_and_do_no_harm():
    data = [{"x": b["x"][:, :2]} for b in batches()]
    reference, cut, fresh = layer(), layer(without_half()), batches(seed=9)
    after, step = recover(cut, reference, data)
    (found,) = (*step.changes, *step.skips)
    assert found.figures["tokens_per_input"] == 1 and found.figures["ridge"] >= 0.1
    assert error(reference, after, fresh) <= error(reference, cut, fresh) / 0.9


def test_what_held_out_data_contradicts_is_not_kept():
    data = batches(count=5)
    for batch in data:  # what goes is in the data to fit to what stays, and in the other the opposite
        batch["x"][..., ::2] = batch["x"][..., 1::2] * (-1 if batch is data[4] else 1)
    after, step = recover(made := layer(without_half()), layer(), data)
    (left,) = step.skips
    assert after is made and left.reason == "its outputs would not be nearer on held-out data"
    assert left.figures["error_after"] > 0.99 * left.figures["error_before"]


@pytest.mark.parametrize("group", [None, 4])
def test_patterns_of_zeros_are_solved_for_alike_whatever_their_number(group):
    """Against the least squares of each row by itself."""
    x = torch.randn(400, WIDTH, generator=torch.Generator().manual_seed(1)).double()
    y, w = x @ weight().double().T, without_half().double()
    if group:
        keep = torch.rand(OUTPUTS, WIDTH // group, group, generator=torch.Generator().manual_seed(2))
        w = weight().double() * (keep.argsort(-1) < 2).reshape(OUTPUTS, WIDTH)
    w[:, 3] = 0.0
    moments = _Moments.none(WIDTH, OUTPUTS)
    moments.add(x, y)
    new, _ = moments.solution(w, False, 1e-9)
    assert torch.equal(new == 0, w == 0)
    a = y.norm(dim=1, keepdim=True)
    for row, found, wanted in zip(w, new, (y / a).T, strict=True):
        best = torch.linalg.lstsq((x / a)[:, row != 0], wanted[:, None]).solution[:, 0]
        torch.testing.assert_close(found[row != 0], best, atol=1e-4, rtol=1e-4)


def test_single_zeros_of_a_dense_weight_are_no_pattern():
    w = weight() + 0.1
    w[torch.arange(OUTPUTS), torch.arange(OUTPUTS)] = 0
    after, _ = recover(layer(w), layer(), batches())
    assert (after.parameters["w"].tensor != 0).all()


# -- the protocol


def test_zeros_stay_and_nothing_else_but_numbers_changes():
    data, reference = batches(WIDTH // 2), layer()
    two_of_four = weight()
    two_of_four.view(-1, 4)[::2, :2] = 0
    two_of_four.view(-1, 4)[1::2, 1:3] = 0
    for cut in (without_half(), two_of_four):
        after = check_pass(
            LeastSquares(), layer(cut), None, unmatched=in_codes(), idempotent=False,
            calibration=data, reference=reference,
        )  # fmt: skip
        assert torch.equal(after.parameters["w"].tensor == 0, cut == 0)
        assert [n.target.name for n in after.main.calls()] == ["linear"] and set(after.parameters) == {
            "w",
            "b",
        }
        assert error(reference, after, data) < 0.5 * error(reference, layer(cut), data)


def in_codes() -> Program:
    return Pipeline(["quantize.rtn"]).run(layer())[0]


def test_a_layer_that_lost_nothing_is_left_alone():
    after, step = recover(made := layer(), layer(), batches())
    assert after is made and step.skips[0].reason == "its outputs are what they were"


def duplicated(layers: int = 2) -> Program:
    """A Transformer in which the second half of the neurons of each block repeats the first."""
    made = Transformer(layers=layers, width=WIDTH, mask=None).build()
    for block in range(layers):
        for part in ("weight", "bias"):
            name = f"block.{block}.ffn.up.{part}"
            tensor = made.parameters[name].tensor.clone()
            tensor[12:] = tensor[:12]
            made.parameters[name] = tensor
    return made


class Drop(Pass):
    """Lossy on purpose: every second block's worth of neurons is not read any more."""

    numerics = Lossy()
    acts_on = ("linear",)

    def run(self, program, context):
        result = PassResult()
        for _, node in self.select(program):
            if node.meta["site"].endswith("down"):
                w = program.parameters[node.args[1].target].tensor.clone()
                w[:, 12:] = 0
                program.parameters[node.args[1].target] = w
                result.change(node, "half of its neurons dropped")
        return result


def test_behind_a_lossy_pass_it_works_towards_the_program_before_that():
    made, data = duplicated(), batches()
    cut, _ = Pipeline([Drop()]).run(made)
    after, report = Pipeline([Drop(), "recover.least_squares"]).run(made, calibration=data)
    changed = {f.site for f in report.steps[-1].changes}
    assert {"block.0.ffn.down", "block.1.ffn.down"} <= changed
    outputs = [torch.cat([p(**b)["hidden"] for b in batches(seed=9)]) for p in (made, cut, after)]
    lost = [(outputs[0] - other).norm() for other in outputs[1:]]
    assert lost[1] < 0.02 * lost[0]


def test_later_layers_make_good_for_earlier_ones_that_may_not_change():
    made, data = duplicated(), batches()
    options = {"pass": "recover.least_squares", "skip": ["block.0.*"]}
    cut, _ = Pipeline([Drop()]).run(made)
    after, report = Pipeline([Drop(), options]).run(made, calibration=data)
    assert all(f.site.startswith("block.1.") for f in report.steps[-1].changes)
    outputs = [torch.cat([p(**b)["hidden"] for b in batches(seed=9)]) for p in (made, cut, after)]
    assert (outputs[0] - outputs[2]).norm() < 0.9 * (outputs[0] - outputs[1]).norm()


# -- places


def test_places_that_cannot_be_fitted_say_why():
    other = layer()
    other.main.calls("linear")[0].meta["site"] = "elsewhere"
    _, step = recover(layer(), other, batches())
    assert [s.reason for s in step.skips] == ["no earlier version of it is known"]

    def twice(build, x, mask):
        w = build.parameter("w", torch.eye(WIDTH))
        return {"y": build.linear(build.linear(x, w, site="first"), w, site="second")}

    made = program(twice, width=WIDTH)
    _, step = recover(made, made, batches())
    assert {s.reason for s in step.skips} == {"its weight is shared with other layers"}
    _, step = recover(in_codes(), layer(), batches())
    assert [(s.site, s.reason) for s in step.skips] == [("layer", "it is 'quantized' already")]


def test_functions_that_share_a_layer_change_together():
    made = layer(without_half())
    second = made.add_function("second", made.main.dims)
    x, build = second.add_input("x", made.main.inputs["x"]), second.builder()
    second.set_outputs({"y": build.linear(x, build.read("w"), build.read("b"), site="again")})
    data = batches(WIDTH // 2)
    after, step = recover(made, layer(), data)
    assert [c.site for c in step.changes] == ["layer"] and set(after.parameters) == {"w", "b"}
    for batch in data[:2]:
        torch.testing.assert_close(run(after.functions["second"], batch), run(after.main, batch))
    after, step = recover(made, layer(), data, skip="again")
    assert after is made
    assert step.skips[0].reason == "layers of other functions with its weights cannot change along"


def test_a_bias_that_something_else_reads_is_not_taken_along():
    def emit(build, x, mask, w):
        b = build.parameter("b", torch.linspace(-1, 1, OUTPUTS))
        return {"y": build.linear(x, build.parameter("w", w), b, site="layer"), "z": build.mul(b, 2.0)}

    reference, cut = (program(lambda *a, w=w: emit(*a, w), width=WIDTH) for w in (weight(), without_half()))
    after, _ = recover(cut, reference, batches(WIDTH // 2))
    assert (
        torch.equal(after.parameters["b"].tensor, torch.linspace(-1, 1, OUTPUTS))
        and len(after.parameters) == 3
    )


def test_layers_that_no_data_reaches_and_other_tokens_are_stated():
    masked = Transformer(layers=1, width=WIDTH).build()
    hidden = [
        {
            "x": b["x"],
            "mask": torch.zeros(2, 1, 1, 32, dtype=torch.bool).index_fill(3, torch.tensor([0]), i > 90),
        }
        for i, b in enumerate(batches())
    ]
    _, step = recover(masked, masked, hidden)
    assert {s.reason for s in step.skips} == {"no calibration data reaches it"}


# -- order


def test_it_belongs_before_rounding_and_stays_behind_what_it_repairs():
    late = Pipeline(["quantize.rtn", "recover.least_squares"])
    with pytest.raises(
        PipelineError, match="(?s)forbids 'quantized'.*move recover.least_squares before quantize.rtn"
    ):
        late.check()
    given = ["quantize.static", "quantize.rtn", Drop(), "recover.least_squares", "recover.bias"]
    assert [p.name for p in Pipeline(given).arrange().passes] == [
        "drop", "recover.least_squares", "quantize.rtn", "quantize.static", "recover.bias",
    ]  # fmt: skip


def test_wrong_ridges_are_refused():
    for ridge in (0.0, -1, "some"):
        with pytest.raises(PipelineError, match="ridge"):
            LeastSquares(ridge=ridge)
