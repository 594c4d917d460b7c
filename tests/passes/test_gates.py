"""Stages are kept only within their budget and when they gain something."""

from __future__ import annotations

import json

import pytest
import torch

from tersor.errors import BudgetError, PipelineError
from tersor.ir.samples import sample_inputs
from tersor.passes import Budget, Context, Fidelity, Lossy, Pass, PassResult, Pipeline, Stage
from tests.passes.programs import Transformer

UP, DOWN = "block.0.ffn.up.weight", "block.0.ffn.down.weight"


class Shift(Pass):
    """Adds to every weight of the first feed-forward layer."""

    by: float = 0.0
    numerics = Lossy()

    def run(self, program, context):
        result = PassResult()
        program.parameters[UP] = program.parameters[UP].tensor + self.by
        result.change("block.0.ffn.up", f"{self.by} added")
        return result


class Narrow(Pass):
    """Takes away neurons, whatever they do."""

    count: int = 1
    numerics = Lossy()
    acts_on = ("linear",)

    def run(self, program, context):
        result = PassResult()
        up, down = (program.parameters[n].tensor for n in (UP, DOWN))
        bias = program.parameters["block.0.ffn.up.bias"].tensor
        program.parameters[UP], program.parameters[DOWN] = up[self.count :], down[:, self.count :]
        program.parameters["block.0.ffn.up.bias"] = bias[self.count :]
        from tersor.passes.weights import refresh

        function = program.main
        for node in function.graph.find_nodes(op="get_attr"):
            node.meta["value"] = program.parameters[node.target].value
        refresh(function, set(function.calls("linear")))
        result.change("block.0.ffn.up", f"{self.count} neurons taken away")
        return result


@pytest.fixture
def made():
    return Transformer(layers=1).build()


@pytest.fixture
def evaluate(made):
    sizes = {"batch": 2, "length": 5}
    return Fidelity(made, (sample_inputs(made.main, sizes, seed) for seed in range(2)))


def gate(passes, made, budget=Budget(), on_fail="revert", **context):  # noqa: B008  an immutable default
    after, report = Pipeline([Stage("s", tuple(passes), budget, on_fail)]).run(made, Context(**context))
    return after, report, report.gates[0]


def test_fidelity_of_the_captured_program_itself_is_perfect(made, evaluate):
    figures = evaluate(made)
    assert figures["sqnr_db"] == float("inf")
    assert figures["cosine"] == pytest.approx(1) and figures["kl"] == pytest.approx(0, abs=1e-12)


def test_fidelity_falls_with_the_error(made, evaluate):
    runs = [evaluate(Pipeline([Shift(by=by)]).run(made)[0]) for by in (0.001, 0.1)]
    assert runs[0]["sqnr_db"] > runs[1]["sqnr_db"] and runs[0]["kl"] < runs[1]["kl"]
    assert runs[0]["cosine"] > runs[1]["cosine"]


def test_outputs_at_padding_do_not_count():
    made = Transformer(layers=1).build()
    batch = sample_inputs(made.main, {"batch": 2, "length": 6})
    batch["mask"] = torch.arange(6).expand(2, 1, 1, 6) < 4
    other = made.copy()
    x = other.main.graph.find_nodes(op="placeholder")[0]
    build = other.main.builder(before=other.main.output_node)
    late = build.cast(build.ge(build.arange(end=x.meta["value"].shape[1]), 4), dtype="float32")
    wrong = build.add(other.main.results[0], build.reshape(late, shape=(1, x.meta["value"].shape[1], 1)))
    other.main.set_outputs({"hidden": wrong})
    assert Fidelity(made, [batch])(other)["sqnr_db"] == float("inf")
    batch["mask"] = torch.ones(2, 1, 1, 6, dtype=torch.bool)
    assert Fidelity(made, [batch])(other)["sqnr_db"] < 30


def test_sqnr_is_the_ratio_of_powers_in_decibels(made):
    made.main.set_outputs({"x": made.main.graph.find_nodes(op="placeholder")[0]})
    double = made.copy()
    x = double.main.graph.find_nodes(op="placeholder")[0]
    double.main.set_outputs({"x": double.main.builder(before=double.main.output_node).mul(x, 1.1)})
    figures = Fidelity(made, [sample_inputs(made.main, {"batch": 1, "length": 4})])(double)
    assert figures["sqnr_db"] == pytest.approx(20, abs=1e-4)
    assert figures["cosine"] == pytest.approx(1)


def test_within_budget_and_smaller_is_kept(made, evaluate):
    after, report, result = gate([Narrow()], made, Budget(min_sqnr_db=1.0), evaluate=evaluate)
    assert (
        result.before["sqnr_db"] == float("inf")
        and report.to_dict()["gates"][0]["before"]["sqnr_db"] == "inf"
    )
    json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert result.decision == "kept" and not result.reasons
    assert after.parameters.bytes < made.parameters.bytes
    assert result.after["bytes"] < result.before["bytes"]


def test_over_budget_is_reverted_and_the_report_says_so(made, evaluate):
    after, report, result = gate([Narrow(count=12)], made, Budget(min_sqnr_db=60.0), evaluate=evaluate)
    assert after is made
    assert result.decision == "reverted" and "is below 60" in result.reasons[0]
    assert report.steps[0].status == "reverted"
    assert "stage s: reverted; sqnr_db" in str(report)


def test_each_pass_of_a_stage_has_its_own_figures(made, evaluate):
    _, report, _ = gate([Shift(by=0.01), Shift(by=0.1), Narrow()], made, evaluate=evaluate)
    first, second, third = (step.fidelity["sqnr_db"] for step in report.steps)
    assert first > second
    assert all(step.stage == "s" for step in report.steps)


def test_warn_keeps_and_stop_raises(made, evaluate):
    arguments = {"made": made, "budget": Budget(min_cosine=0.9999999), "evaluate": evaluate}
    after, report, result = gate([Narrow(count=12)], on_fail="warn", **arguments)
    assert result.decision == "warned" and result.reasons and after is not made
    with pytest.raises(BudgetError, match="stage 's' failed: cosine") as raised:
        gate([Narrow(count=12)], on_fail="stop", **arguments)
    assert raised.value.report.gates[0].decision == "stopped"


def test_a_stage_that_gains_nothing_is_taken_back(made):
    _, _, result = gate([Shift(by=0.1)], made)
    assert (result.decision, result.reasons) == ("reverted", ["it is neither faster nor smaller"])
    assert gate([Shift(by=0.1)], made, Budget(must_gain=False))[2].decision == "kept"
    assert gate([Shift(by=0.1)], made, measure=lambda p: 1.0 if p is made else 0.5)[2].decision == "kept"
    # within the noise of a measurement
    assert gate([Shift(by=0.1)], made, measure=lambda p: 1.0 if p is made else 0.99)[2].decision == "reverted"


def test_a_stage_that_changes_nothing_is_not_judged(made):
    assert gate(["fold.norm_gamma"], made)[2].decision == "unchanged"


@pytest.mark.parametrize(
    ("budget", "figures", "fails"),
    [
        (Budget(max_kl=0.1), {"kl": 0.2}, "kl 0.2 is above 0.1"),
        (Budget(max_kl=0.1), {"kl": float("nan")}, "kl nan is above 0.1"),
        (Budget(max_drop=0.5), {"metric": 80.0}, "metric fell by 2 to 80, more than 0.5"),
        (Budget(max_drop=3.0), {"metric": 80.0}, None),
    ],
)
def test_budgets(budget, figures, fails):
    found = budget.failures({"bytes": 2.0, "metric": 82.0}, {"bytes": 1.0, **figures})
    assert found == ([fails] if fails else [])


def test_a_budget_that_nothing_evaluates_is_an_error_before_any_pass(made):
    ran = []

    class Spy(Shift):
        """Remembers that it ran."""

        def run(self, program, context):
            ran.append(1)
            return PassResult()

    with pytest.raises(PipelineError, match="needs kl, which nothing evaluates"):
        gate([Spy()], made, Budget(max_kl=0.1))
    assert not ran


def test_an_evaluation_that_fails_is_named(made):
    def evaluate(program):
        raise ZeroDivisionError("no data")

    with pytest.raises(PipelineError, match="judging stage 's' failed: ZeroDivisionError: no data"):
        gate([Shift(by=1.0)], made, evaluate=evaluate)


def test_what_a_reverted_stage_gave_is_missing_afterwards_and_said(made):
    class Fill(Pass):
        """Leaves two of four weights of the first layer."""

        provides = {"masked"}
        numerics = Lossy()
        acts_on = ("linear",)

        def run(self, program, context):
            weight = program.parameters[UP].tensor
            program.parameters[UP] = torch.where(torch.arange(16) % 4 < 2, weight, 0.0)
            result = PassResult()
            result.change("block.0.ffn.up", "half of it cleared")
            return result

    class Pack(Pass):
        """Needs the mask."""

        requires = {"masked"}
        acts_on = ("linear",)

        def run(self, program, context):
            raise AssertionError("there is nothing to pack")

    steps = [Stage("prune", (Fill(only="*.up"),)), Pack(only="*.up"), "fold.key_bias"]
    after, report = Pipeline(steps).run(made)
    assert [s.status for s in report.steps] == ["reverted", "skipped", "changed"]
    assert "stage 'prune', which gave it, was reverted" in report.steps[1].notes[0]


def test_held_out_batches_are_needed_and_may_be_an_iterator(made):
    with pytest.raises(PipelineError, match="no held-out batches"):
        Fidelity(made, iter(()))


def test_a_stage_is_checked_when_it_is_written():
    with pytest.raises(PipelineError, match="has no passes"):
        Stage("empty", ())
    with pytest.raises(PipelineError, match="on_fail='ignore'"):
        Stage("s", ("fold.key_bias",), on_fail="ignore")
