"""Patterns, rules, reports."""

import pytest
import torch

from tersor.errors import ProgramError
from tersor.ir import Program, Value, run, verify
from tersor.ir.matching import P, Rule, apply_rules, find


def function_with(make):
    """A function of one input x [2, 4] whose result is ``make(build, x)``."""
    program = Program()
    function = program.add_function("main")
    x = function.add_input("x", Value("float32", (2, 4)))
    function.set_outputs({"y": make(function.builder(), x)})
    verify(program)
    return program, function


def sigmoid_times(build, x):
    return build.mul(build.sigmoid(x), x)


SILU = Rule("to_silu", P.mul(P.any("x"), P.sigmoid(P.any("x"))), lambda build, m: build.silu(m["x"]))


def test_a_rule_matches_commutative_operands_in_either_order():
    program, function = function_with(sigmoid_times)
    x = torch.randn(2, 4)
    before = run(function, {"x": x})["y"]
    report = apply_rules(function, [SILU])
    assert [n.target.name for n in function.calls()] == ["silu"]
    assert report.counts() == {"to_silu": 1}
    verify(program)
    torch.testing.assert_close(run(function, {"x": x})["y"], before)


def test_a_name_captured_twice_must_be_one_value():
    _, function = function_with(lambda b, x: b.mul(b.sigmoid(x), b.neg(x)))
    report = apply_rules(function, [SILU])
    assert not report
    assert [n.target.name for n in function.calls()] == ["sigmoid", "neg", "mul"]


def test_non_commutative_operands_keep_their_order():
    pattern = P.sub(P.any("x"), P.neg(P.any()))
    _, function = function_with(lambda b, x: b.sub(b.neg(x), x))
    assert find(pattern, function, function.calls("sub")[0]) is None


def test_attributes_are_compared_or_given_to_a_predicate():
    _, function = function_with(lambda b, x: b.softmax(x, dim=-1))
    node = function.calls("softmax")[0]
    assert find(P.softmax(P.any("x"), dim=-1), function, node)
    assert find(P.softmax(P.any("x"), dim=lambda d: d in (1, -1)), function, node)
    assert find(P.softmax(P.any("x"), dim=0), function, node) is None


def test_number_parameter_through_and_alternatives():
    def make(build, x):
        shifted = build.add(build.cast(build.neg(x), dtype="float32"), 0.5)
        return build.mul(shifted, build.parameter("w", torch.ones(4)))

    _, function = function_with(make)
    inner = P.through(("cast",), P.one_of(P.abs(P.any("x")), P.neg(P.any("x")).named("negated")))
    match = find(P.mul(P.parameter("w"), P.add(inner, P.number("c"))), function, function.calls("mul")[0])
    assert match["c"] == 0.5
    assert match["negated"].target.name == "neg" and match["x"].op == "placeholder"
    assert match.parameter("w").shape == (4,)
    assert {n.target.name for n in match.nodes} == {"mul", "add", "cast", "neg"}


def test_a_check_that_objects_is_reported_with_its_reason():
    _, function = function_with(sigmoid_times)
    cautious = Rule("to_silu", SILU.pattern, SILU.rewrite, lambda m: f"rank {m.value('x').rank} is not 3")
    report = apply_rules(function, [cautious])
    assert not report
    assert [e.reason for e in report.skipped] == ["rank 2 is not 3"]


def test_a_structural_near_match_says_what_was_different():
    rms = P.mul(P.any("x"), P.rsqrt(P.add(P.mean(P.pow(P.any("x"), 2), dims=(-1,)), P.number("eps"))))
    rule = Rule("rms", rms, lambda b, m: b.rms_norm(m["x"], eps=m["eps"]))

    def cubed(build, x):
        mean = build.mean(build.pow(x, 3), dims=(-1,), keepdim=True)
        return build.mul(x, build.rsqrt(build.add(mean, 1e-6)))

    _, function = function_with(cubed)
    report = apply_rules(function, [rule])
    assert not report
    assert "3 is not 2" in report.skipped[0].reason


def test_new_nodes_carry_shape_provenance_and_site():
    program, function = function_with(sigmoid_times)
    root = function.calls("mul")[0]
    root.meta.update(site="mlp.act", module="mlp", source="model.py:3")
    apply_rules(function, [SILU])
    meta = function.calls("silu")[0].meta
    assert meta["value"] == Value("float32", (2, 4))
    assert (meta["site"], meta["module"], meta["source"]) == ("mlp.act", "mlp", "model.py:3")
    assert meta["made_by"] == "to_silu"


def test_rules_that_undo_each_other_are_an_error():
    _, function = function_with(lambda b, x: b.neg(x))
    there = Rule("there", P.neg(P.any("x")), lambda b, m: b.mul(m["x"], -1.0))
    back = Rule("back", P.mul(P.any("x"), -1.0), lambda b, m: b.neg(m["x"]))
    with pytest.raises(ProgramError, match="do not settle"):
        apply_rules(function, [there, back])


def test_a_misspelt_operation_in_a_pattern_is_an_error():
    with pytest.raises(ProgramError, match="unknown operation"):
        P.softmaxx(P.any("x"))
