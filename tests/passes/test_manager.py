"""The manager holds passes to what they declare, and leaves the user's program alone."""

from __future__ import annotations

import json

import pytest
import torch

from tersor.errors import InputError, PipelineError, ProgramError
from tersor.ir import Parameter, Program, Value
from tersor.passes import Context, Equivalent, Exact, Lossy, Pass, PassResult, Pipeline
from tests.passes.programs import Transformer, program

UP = "block.0.ffn.up.weight"


class Scale(Pass):
    """Multiplies the weights of the selected linear layers."""

    by: float = 1.0
    numerics = Equivalent(1e-5)
    acts_on = ("linear",)

    def run(self, program, context):
        result = PassResult()
        for function, node in self.select(program):
            weight = function.parameter(node.args[1])
            program.parameters[node.args[1].target] = weight * self.by
            result.change(node, f"times {self.by}")
        return result


def contents(program: Program) -> dict[str, str]:
    return {name: Parameter(p.tensor).digest for name, p in program.parameters.items()}


@pytest.fixture
def made() -> Program:
    return Transformer(layers=1).build()


def failing(pass_: Pass, made: Program, match: str, **context) -> PipelineError:
    """Runs a pass behind a good one, which must fail, and leave the program as it was."""
    before = made.digest(), contents(made)
    with pytest.raises(PipelineError, match=match) as raised:
        Pipeline(["fold.key_bias", pass_]).run(made, Context(**context))
    assert (made.digest(), contents(made)) == before
    assert f"pass {pass_.name!r} failed" in raised.value.what
    assert raised.value.where == f"{pass_}, after fold.key_bias"
    return raised.value


def test_an_unmodified_program_is_the_very_same(made):
    after, report = Pipeline(["fold.norm_gamma", "cleanup.dead_code"]).run(made)
    assert after is made
    assert [s.status for s in report.steps] == ["unchanged", "unchanged"]


def test_a_pass_that_raises_leaves_the_program_and_is_named(made):
    class Raise(Pass):
        """Fails half way."""

        def run(self, program, context):
            program.parameters[UP] = torch.zeros(24, 16)
            raise KeyError("lost")

    error = failing(Raise(), made, "KeyError: 'lost'")
    assert isinstance(error.__cause__, KeyError)


def test_a_pass_that_breaks_the_program_is_stopped(made):
    class Break(Pass):
        """Stores a weight that does not fit."""

        def run(self, program, context):
            program.parameters[UP] = torch.zeros(3, 3)
            return PassResult()

    failing(Break(), made, "not well formed")


@pytest.mark.parametrize("way", ["mul_", "copy_", "index", "out", "view"])
def test_writing_into_a_parameter_is_stopped_before_it_happens(made, way):
    class Write(Pass):
        """Writes in place."""

        def run(self, program, context):
            weight = program.parameters[UP].tensor
            if way == "mul_":
                weight.mul_(0.5)
            elif way == "copy_":
                weight.copy_(torch.zeros_like(weight))
            elif way == "index":
                weight[0] = 0
            elif way == "out":
                torch.add(weight, 1, out=weight)
            else:
                weight.view(-1)[:3].zero_()
            return PassResult()

    failing(Write(), made, f"would write into the parameter '{UP}'")


def test_writing_into_a_pass_s_own_tensors_is_fine(made):
    class Own(Pass):
        """Clears the first neuron in a copy."""

        numerics = Lossy()

        def run(self, program, context):
            weight = program.parameters[UP].tensor.clone()
            weight[0] = 0
            weight.mul_(2.0)
            program.parameters[UP] = weight
            result = PassResult()
            result.change("block.0.ffn.up", "cleared")
            return result

    after, _ = Pipeline([Own()]).run(made)
    assert not after.parameters[UP].tensor[0].any() and made.parameters[UP].tensor[0].any()


def test_the_signature_stays(made):
    class Drop(Pass):
        """Forgets the result's shape."""

        def run(self, program, context):
            function = program.main
            (last,) = function.results
            function.set_outputs(
                {"hidden": function.builder(before=function.output_node).sum(last, dims=(1,))}
            )
            return PassResult()

    failing(Drop(), made, "the outputs of 'main' changed from hidden: .* to hidden: ")


def test_run_has_to_return_a_result(made):
    class Forget(Pass):
        """Returns nothing."""

        def run(self, program, context):
            pass

    assert failing(Forget(), made, "run returned NoneType").fix == "return a PassResult"


def test_equivalent_is_held_to_its_tolerance(made):
    after, report = Pipeline([Scale(by=1 + 1e-6, only="*.up")]).run(made)
    assert 0 < report.steps[0].error <= 1e-5 and after is not made
    failing(
        Scale(by=1.001, only="*.up"),
        made,
        r"declared equivalent to 1e-05, but results differ by .*e-0",
    )
    # who does not want to pay for the comparison takes the pass's word
    Pipeline([Scale(by=1.001)]).run(made, Context(numerics="never"))


def test_exact_means_the_same_numbers(made):
    class Claim(Scale):
        """Says more than it keeps."""

        numerics = Exact()

    failing(Claim(by=1 + 1e-4, only="*.up"), made, "declared exact, but results differ")
    Pipeline([Claim(by=1 + 1e-7, only="*.up")]).run(made)  # less than another order of summation would do


def test_lossy_is_measured_not_refused(made):
    class Coarse(Scale):
        """May do anything."""

        numerics = Lossy()

    _, report = Pipeline([Coarse(by=1.1), Coarse(by=1.1)]).run(made)
    first, second = report.steps
    assert first.error == first.total_error > 0.01
    assert second.total_error > second.error > 0.01


def test_comparison_uses_the_inputs_given(made):
    inputs = {"main": {"x": torch.zeros(1, 1, 16), "mask": torch.ones(1, 1, 1, 1, dtype=torch.bool)}}

    class Negate(Scale):
        """A norm of zeros is its beta; without beta nothing would show."""

        numerics = Lossy()

    _, report = Pipeline([Negate(by=1.0 + 1e-3, only="*.query")]).run(made, Context(inputs=inputs))
    # one key: the softmax is 1 whatever the query
    assert report.steps[0].error == 0


def test_inputs_that_do_not_fit_are_an_error_and_made_up_ones_that_do_not_run_a_note(made):
    with pytest.raises(InputError, match="does not run on the inputs given"):
        Pipeline([Scale(by=1 + 1e-6)]).run(made, Context(inputs={"main": {"x": torch.zeros(1)}}))

    def emit(build, x, mask):
        # every index is far outside of the table
        ids = build.add(build.argmax(x, dim=-1), 1000)
        rows = build.embedding(ids, build.parameter("table", torch.ones(4, 16)))
        return {"y": build.linear(rows, build.parameter("w", torch.ones(4, 16)), site="linear")}

    after, report = Pipeline([Scale(by=2.0), Scale(by=2.0)]).run(program(emit))
    assert [step.modified for step in report.steps] == [True, True]
    assert (
        len(report.notes) == 1
        and "does not run on inputs made from its signature (InputError" in report.notes[0]
    )


def test_a_program_that_no_longer_runs_is_stopped(made):
    class Shuffle(Pass):
        """Reads rows that the table does not have."""

        numerics = Lossy()

        def run(self, program, context):
            function, result = program.main, PassResult()
            (last,) = function.results
            build = function.builder(before=function.output_node)
            index = build.parameter("index", torch.full((16,), 99))
            function.set_outputs({"hidden": build.index_select(last, index, dim=2)})
            result.change("block.1.ffn", "shuffled")
            return result

    failing(Shuffle(), made, "its result does not run: InputError")


def test_a_misspelt_mode_is_refused():
    with pytest.raises(InputError, match="numerics = 'allways'"):
        Context(numerics="allways")


def test_large_programs_are_compared_only_on_demand(made, monkeypatch):
    monkeypatch.setattr("tersor.passes.manager.COMPARED_BYTES", 10)
    _, report = Pipeline([Scale(by=1.001)]).run(made)
    assert report.steps[0].error is None and "too large" in report.notes[0]
    with pytest.raises(PipelineError, match="declared equivalent"):
        Pipeline([Scale(by=1.001)]).run(made, Context(numerics="always"))


def test_the_word_of_a_pass_is_not_taken_for_what_it_did(made):
    class Liar(Pass):
        """Says that it did something."""

        def run(self, program, context):
            result = PassResult()
            result.change("block.0.ffn", "nothing")
            return result

    class Silent(Scale):
        """Changes without a word."""

        numerics = Lossy()

        def run(self, program, context):
            super().run(program, context)
            return PassResult()

    after, report = Pipeline([Liar(), Silent(by=2.0)]).run(made)
    assert [s.modified for s in report.steps] == [False, True]
    assert "the program is the same" in report.steps[0].notes[0]
    assert "without saying where" in report.steps[1].notes[0]


def test_a_promised_fact_has_to_hold_where_the_pass_changed_something(made):
    class Promise(Scale):
        """Promises a sparsity that it does not make."""

        provides = {"masked"}
        numerics = Lossy()

    failing(Promise(by=2.0, only="*.up"), made, "provides 'masked', which does not hold at block.0.ffn.up")


def test_a_fact_may_end_only_where_that_is_declared(made):
    weight = made.parameters[UP].tensor.clone()
    weight[:, ::2] = 0
    made.parameters[UP] = weight

    class Fill(Scale):
        """Fills the holes."""

        numerics = Lossy()

        def run(self, program, context):
            program.parameters[UP] = torch.ones(24, 16)
            result = PassResult()
            result.change("block.0.ffn.up", "filled")
            return result

    failing(Fill(), made, "ended the fact 'masked' at block.0.ffn.up")

    class Declared(Fill):
        """Says so."""

        invalidates = {"masked"}

    Pipeline([Declared()]).run(made)


def test_a_malformed_program_is_refused_before_any_pass():
    broken = Transformer(layers=1).build()
    broken.main.calls("linear")[0].meta["value"] = Value("float32", (1,))
    with pytest.raises(ProgramError, match="not well formed"):
        Pipeline([]).run(broken)


def test_runs_are_deterministic_and_random_numbers_come_from_the_seed(made):
    class Noise(Pass):
        """Adds noise to a weight."""

        numerics = Lossy()

        def run(self, program, context):
            weight = program.parameters[UP].tensor
            program.parameters[UP] = weight + torch.randn(
                weight.shape, generator=context.generator(self.name)
            )
            result = PassResult()
            result.change("block.0.ffn.up", "noise added")
            return result

    runs = [Pipeline([Noise()]).run(made, Context(seed=seed))[0].digest() for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]


def test_progress_names_each_pass_as_it_starts(made):
    seen = []
    Pipeline(["cleanup.dead_code", "fold.key_bias"]).run(made, Context(progress=seen.append))
    assert seen == ["cleanup.dead_code", "fold.key_bias"]


def test_the_report_is_plain_data_and_a_table(made, tmp_path):
    _, report = Pipeline(["fold.norm_beta", "fold.key_bias", "cleanup.dead_code"], name="mine").run(made)
    report.save(tmp_path / "report.json")
    data = json.loads((tmp_path / "report.json").read_text())
    assert data == json.loads(json.dumps(report.to_dict()))
    step = data["steps"][1]
    assert (step["name"], step["status"], step["modified"]) == ("fold.key_bias", "changed", True)
    assert step["before"]["parameters"] - step["after"]["parameters"] == 16
    assert step["before"]["bytes"] - step["after"]["bytes"] == 64
    assert step["changes"] == [{"site": "block.0.attention", "reason": "key bias dropped", "figures": {}}]
    text = str(report)
    assert "pipeline mine" in text and "fold.key_bias" in text and "changed" in text


def test_the_report_says_why_nothing_happened():
    _, report = Pipeline(["fold.key_bias"]).run(Transformer(layers=5, rotary=True).build())
    assert (
        "block.0.attention, block.1.attention, block.2.attention and 2 more: between the key projection and"
        in str(report).replace("\n", " ")
    )
