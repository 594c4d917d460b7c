"""Wrong orders are found before any work, all at once, each with what to do; arranging is explicit and stable."""

from __future__ import annotations

import pytest

from tersor.errors import PipelineError
from tersor.ir import Program, Value
from tersor.passes import Budget, Context, Equivalent, Lossy, Pass, PassResult, Pipeline, Stage, facts
from tersor.passes.fold.key_bias import FoldKeyBias
from tersor.passes.order import violations
from tests.passes.programs import Transformer


class Toy(Pass):
    """Does nothing; subclasses differ in what they declare."""

    numerics = Equivalent()
    acts_on = ("linear",)

    def run(self, program, context):
        return PassResult()


class Smooth(Toy):
    """Needs float weights."""

    stage = "smooth"
    forbids = {"quantized"}


class Quantize(Toy):
    """Makes the weights integers, once."""

    stage = "quantize.weights"
    forbids = {"quantized"}
    provides = {"quantized"}


class Sparsify(Toy):
    """Leaves two of four weights."""

    stage = "prune.nm"
    provides = {"masked"}


class Factorize(Toy):
    """Splits matrices, which fills their zeros."""

    stage = "factorize"
    invalidates = {"masked"}


class Pack(Toy):
    """Stores only what a mask leaves."""

    stage = "lower"
    requires = {"masked"}


class Requantize(Toy):
    """Needs integers."""

    stage = "requantize"
    requires = {"quantized"}


class Cleanup(Toy):
    """Belongs anywhere."""


def found(*passes, program=None):
    return [(v.kind, v.pass_, v.what, v.fix) for v in violations(passes, program)]


def test_a_right_order_has_no_violations():
    assert not found(Factorize(), Sparsify(), Smooth(), Quantize(), Requantize(), Pack())


def test_three_faults_give_one_message_with_every_violation_and_its_fix():
    pipeline = Pipeline([Requantize(), Quantize(), Smooth(), Quantize(only="*"), Pack()], name="mine")
    with pytest.raises(PipelineError) as raised:
        pipeline.check()
    assert str(raised.value).splitlines() == [
        "pipeline 'mine' is wrong in 4 places:",
        "  - [order] 1. requantize needs 'quantized', which only 2. quantize gives, after it",
        "      fix: move requantize after quantize",
        "  - [order] 3. smooth forbids 'quantized', which 2. quantize gives before it",
        "      fix: move smooth before quantize",
        "  - [forbidden] 4. quantize forbids 'quantized', which 2. quantize gives",
        "      fix: keep one of the two, or give them different sites with only= and skip=",
        "  - [missing] 5. pack needs 'masked' (At most two of every four consecutive input channels of the weights are"
        " used (2:4 sparsity).), which nothing gives",
        "      fix: remove pack",
    ]


def test_undoing_the_work_of_an_earlier_pass_is_a_violation():
    assert found(Sparsify(), Factorize()) == [
        ("order", "2. factorize", "ends 'masked', the work of 1. sparsify", "move factorize before sparsify")
    ]
    assert not found(Sparsify(), Factorize(), Sparsify())


def test_what_was_ended_in_between_is_not_there_any_more():
    kinds = [(kind, who, what) for kind, who, what, _ in found(Sparsify(), Factorize(), Pack())]
    assert ("order", "3. pack", "needs 'masked', which 2. factorize ends before it") in kinds


def test_a_missing_pass_is_named_when_one_is_registered():
    from tersor.passes.registry import _passes, register

    register("toy.sparsify")(Sparsify)
    try:
        ((kind, _, _, fix),) = found(Pack())
        assert (kind, fix) == ("missing", "put toy.sparsify before it")
    finally:
        del _passes["toy.sparsify"]
        Sparsify.name = "sparsify"


def test_different_sites_do_not_disturb_each_other():
    assert not found(Quantize(only="block.0.*"), Smooth(only="block.1.*"))
    assert not found(Quantize(skip="block.1.*"), Smooth(only="block.1.*"))
    assert found(Quantize(only="block.0.*"), Smooth(only="block.0.*"))


def test_a_program_tells_exactly_where_patterns_meet():
    made = Transformer(layers=1).build()
    assert not found(Quantize(only="*.ffn.*"), Smooth(only="*attention*"), program=made)
    # without the program nobody can tell whether these two meet
    assert not found(Quantize(only="*.ffn.*"), Smooth(only="block.*"))
    ((kind, who, *_),) = found(Quantize(only="*.ffn.*"), Smooth(only="block.*"), program=made)
    assert (kind, who) == ("order", "2. smooth")


def test_a_requirement_has_to_be_met_at_every_selected_site():
    made = Transformer(layers=1).build()
    assert not found(Sparsify(only="*.ffn.*"), Pack(only="*.ffn.up"), program=made)
    ((kind, who, *_),) = found(Sparsify(only="*.ffn.up"), Pack(only="*.ffn.*"), program=made)
    assert (kind, who) == ("missing", "2. pack")


def test_what_the_program_already_is_can_be_forbidden():
    class Moving(Toy):
        """Wants sizes that vary."""

        forbids = {"static"}

    made = Program()
    function = made.add_function("main")
    x = function.add_input("x", Value("float32", (2, 3)))
    function.set_outputs({"y": function.builder().relu(x)})
    ((kind, _, what, fix),) = found(Moving(), program=made)
    assert (kind, what, fix) == (
        "forbidden",
        "forbids 'static', which the program is already",
        "remove moving",
    )


def test_sites_that_already_are_what_a_pass_forbids_are_left_out():
    made = Transformer(layers=1).build()
    weight = made.parameters["block.0.ffn.up.weight"].tensor.clone()
    weight[:, 2::4] = weight[:, 3::4] = 0
    made.parameters["block.0.ffn.up.weight"] = weight

    class Dense(Toy):
        """Wants no holes."""

        forbids = {"masked"}

    assert not found(Dense(), program=made)


def test_misspelt_facts_and_sites_are_violations():
    class Misspelt(Toy):
        """Names a fact that is not there."""

        requires = {"qantized"}

    made = Transformer(layers=1).build()
    kinds = found(Misspelt(), FoldKeyBias(skip="block.0.atention"), program=made)
    assert [(kind, who) for kind, who, *_ in kinds] == [
        ("unknown", "1. misspelt"),
        ("unknown", "2. fold.key_bias"),
    ]
    assert kinds[0][3] == "did you mean 'quantized'?"
    assert "'block.0.attention'" in kinds[1][3]


def test_run_checks_before_any_work():
    ran = []

    class Spy(Toy):
        """Remembers that it ran."""

        def run(self, program, context):
            ran.append(self.name)
            return PassResult()

    with pytest.raises(PipelineError, match="wrong in one place"):
        Pipeline([Spy(), Requantize()]).run(Transformer(layers=1).build())
    assert not ran


def test_arranging_follows_facts_and_the_canonical_order():
    pipeline = Pipeline([Requantize(), Pack(), Quantize(), Smooth(), Sparsify(), Factorize()]).arrange()
    names = [p.name for p in pipeline]
    assert names == ["factorize", "sparsify", "smooth", "quantize", "requantize", "pack"]
    pipeline.check()


def test_arranging_is_stable_and_leaves_a_right_list_alone():
    right = [Cleanup(), Sparsify(), Cleanup(skip="a"), Smooth(), Cleanup(skip="b"), Quantize(), Requantize()]
    assert Pipeline(right).arrange().steps == right


def test_a_pass_without_a_stage_stays_behind_its_neighbour():
    pipeline = Pipeline([Quantize(), Cleanup(skip="q"), Smooth(), Cleanup(skip="s")]).arrange()
    assert [str(p) for p in pipeline] == ["smooth", "cleanup(skip=['s'])", "quantize", "cleanup(skip=['q'])"]


def test_arranging_looks_into_stages():
    stage = Stage("int", (Requantize(), Quantize()), Budget())
    pipeline = Pipeline([stage, Smooth()]).arrange()
    assert [s.name for s in pipeline] == ["smooth", "int"]
    assert [p.name for p in pipeline.passes] == ["smooth", "quantize", "requantize"]


def test_a_circle_is_named():
    class Left(Toy):
        """Gives what the other forbids."""

        provides = {"masked"}
        forbids = {"quantized"}

    class Right(Toy):
        """And the other way round."""

        provides = {"quantized"}
        forbids = {"masked"}

    with pytest.raises(PipelineError, match="no order of these passes is right") as raised:
        Pipeline([Left(), Right()]).arrange()
    assert "left forbids 'quantized'" in str(raised.value) and "right forbids 'masked'" in str(raised.value)


def test_the_plan_says_what_would_run_and_what_is_unusual():
    class Fold(Toy):
        """Folds something.

        At length.
        """

        stage = "fold"
        numerics = Lossy()

    pipeline = Pipeline([Sparsify(), Stage("late", (Fold(skip="head"),), Budget(min_cosine=0.9))])
    plan = pipeline.explain()
    assert str(plan).splitlines() == [
        "pipeline custom: 2 passes",
        "  1. sparsify  [equivalent to 1e-06]",
        "     Leaves two of four weights.",
        "     gives masked",
        "  stage late (min_cosine=0.9, on_fail=revert)",
        "    2. fold(skip=['head'])  [lossy]",
        "       Folds something.",
        "  note: fold (fold) comes after sparsify (prune.nm); the usual order is the other way round, which arrange()"
        " gives",
    ]
    assert [step["gate"] for step in plan.to_dict()["steps"]] == [None, "late"]


def test_recorded_facts_lapse_when_the_program_changes():
    facts.recorded_fact("toy.statistics", "statistics of the activations")
    try:

        class Collect(Toy):
            """Records something."""

            provides = {"toy.statistics"}

            def run(self, program, context):
                context.records.put("toy.statistics", program, {"x": 1.0})
                return PassResult()

        class Use(Toy):
            """Reads it."""

            requires = {"toy.statistics"}

        assert not found(Collect(), Use())
        ((kind, _, what, _),) = found(Collect(), Cleanup(), Use())
        assert kind == "order" and "2. cleanup ends" in what
        made, context = Transformer(layers=1).build(), Context()
        Pipeline([Collect(), Use()]).run(made, context)
        assert context.records.get("toy.statistics", made) == {"x": 1.0}
        changed, _ = Pipeline(["fold.key_bias"]).run(made)
        assert context.records.get("toy.statistics", changed) is None
    finally:
        del facts._table["toy.statistics"]
