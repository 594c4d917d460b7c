"""Dead code, common subexpressions and constants."""

from __future__ import annotations

import torch

from tersor.passes import Pipeline
from tersor.passes.cleanup.common_subexpressions import MergeCommonSubexpressions
from tersor.passes.cleanup.constant_folding import FoldConstants
from tersor.passes.cleanup.dead_code import RemoveDeadCode
from tests.passes.check_pass import apply, check_pass
from tests.passes.programs import Transformer, Weights, program


def test_dead_operations_go_with_their_parameters():
    def emit(dead):
        def inner(build, x, mask):
            if dead:
                build.exp(build.linear(x, build.parameter("unused", torch.ones(4, 16)), site="dead"))
            return {"y": build.relu(x)}

        return inner

    after = check_pass(
        RemoveDeadCode(), program(emit(True)), program(emit(False)), unmatched=Transformer(layers=1).build()
    )
    assert not after.parameters


def test_dead_code_in_skip_stays():
    def emit(build, x, mask):
        build.relu(x, site="spared")
        build.exp(x, site="gone")
        return {"y": x}

    after = apply(RemoveDeadCode(skip="spared"), program(emit))
    assert [n.meta["site"] for n in after.main.calls()] == ["spared"]


def test_equal_operations_become_one():
    def emit(twice):
        def inner(build, x, mask):
            first = build.exp(x)
            return {"y": build.add(first, build.exp(x) if twice else first)}

        return inner

    check_pass(
        MergeCommonSubexpressions(),
        program(emit(True)),
        program(emit(False)),
        unmatched=Transformer(layers=1).build(),
    )


def test_equal_numbers_of_different_types_are_different_operands():
    def emit(build, x, mask):
        ids = build.argmax(x, dim=-1)
        return {"whole": build.add(ids, 1), "broken": build.add(ids, 1.0)}

    made = program(emit)
    assert apply(MergeCommonSubexpressions(), made) is made


def test_a_constant_is_computed_once():
    def emit(folded):
        def inner(build, x, mask):
            make = Weights(build)
            weight = make.tensor(16, 8)
            if folded:
                return {"y": build.linear(x, build.parameter("w", weight.T.contiguous()), site="linear")}
            turned = build.permute(build.parameter("w", weight), dims=(1, 0))
            return {"y": build.linear(x, turned, site="linear")}

        return inner

    check_pass(
        FoldConstants(), program(emit(False)), program(emit(True)), unmatched=Transformer(layers=1).build()
    )


def test_a_table_over_a_dynamic_dimension_is_computed_for_its_largest_size():
    made = Transformer(layers=1, rotary=True).build()
    after = apply(FoldConstants(), made)
    assert not after.main.calls("cos", "sin", "arange")


def test_a_constant_that_would_be_large_stays_and_the_report_says_so():
    def emit(build, x, mask):
        wide = build.mul(build.parameter("a", torch.ones(600, 1)), build.parameter("b", torch.ones(1, 600)))
        return {"y": build.add(build.sum(x, dims=(0, 1, 2)), build.sin(wide))}

    made = program(emit)
    _, report = Pipeline([FoldConstants()]).run(made)
    (step,) = report.steps
    assert not step.modified and "1440000 bytes" in step.skips[0].reason
