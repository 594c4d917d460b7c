"""The comparison of compiled code with its program: which sizes it tries, what it notices."""

from __future__ import annotations

import math

import pytest
import torch

from tersor.codegen.compare import compare, probe_sizes, relative_error
from tersor.errors import BudgetError, CompileError
from tersor.ir import Dim, Function, Program, Range, Value, run

N = Dim.symbol("n")


def doubling(rows: int = 8) -> Function:
    """y = 2 x, and the first rows of a table, as many as there are positions."""
    function = Program().add_function("main", {"n": Range(1, 8)})
    x = function.add_input("x", Value("float32", (N, 4)))
    build = function.builder()
    taken = build.index_select(build.parameter("table", torch.ones(rows, 4)), build.arange(end=N), dim=0)
    function.set_outputs({"y": build.mul(x, 2.0), "z": build.add(x, taken)})
    return function


def test_programs_of_codes_are_compared_by_their_distance():
    """One code of many may be another; a wrong scale is noticed."""
    function = Program().add_function("main", {"n": Range(200, 200)})
    x = function.add_input("x", Value("float32", (N, 64)))
    function.set_outputs({"y": function.builder().round(x)})

    def moved(by: float, where: slice):
        def call(inputs, states):
            result = run(function, inputs, states)
            result["y"] = result["y"].clone()
            result["y"][where] += by
            return result

        return call

    assert compare(function, moved(1.0, slice(0, 0)))[0].worst == 0
    few = compare(function, moved(1e-2, slice(0, 100)))[0]
    assert 1e-4 < few.worst < 0.0141
    with pytest.raises(BudgetError, match="disagrees"):
        compare(function, moved(1.0, slice(0, 100)))


def test_programs_that_amplify_rounding_are_allowed_what_they_do_themselves():
    """(x + 1e4) - 1e4 keeps few digits of x in float32; behind it, rounding to codes magnifies that."""
    function = Program().add_function("main", {"n": Range(200, 200)})
    x = function.add_input("x", Value("float32", (N, 64)))
    build = function.builder()
    coarse = build.sub(build.add(x, 1e5), 1e5)
    function.set_outputs({"y": build.round(build.mul(coarse, 3.0))})

    def off_by(share: float):
        def call(inputs, states):
            result = run(function, inputs, states)["y"].clone()
            result.view(-1)[: int(share * result.numel())] += 1.0
            return {"y": result}

        return call

    worst = compare(function, off_by(0.002))[0].worst
    assert worst > 0.0141
    with pytest.raises(BudgetError):
        compare(function, off_by(0.5))


def test_the_ends_and_the_middle_of_every_range_are_tried():
    function = Program().add_function("main", {"n": Range(1, 8), "m": Range(3, 3)})
    sizes = probe_sizes(function)
    assert {s["n"] for s in sizes} == {1, 5, 8} and {s["m"] for s in sizes} == {3}
    assert len(sizes) == 3, "each once"


def test_right_code_passes_with_its_errors():
    function = doubling()
    found = compare(function, lambda inputs, states: run(function, inputs, states))
    assert [c.worst for c in found] == [0.0] * len(found) and {c.sizes["n"] for c in found} == {1, 5, 8}


@pytest.mark.parametrize("wrong", [1e-3, math.nan, math.inf])
def test_wrong_code_is_named(wrong):
    function = doubling()

    def broken(inputs, states):
        results = run(function, inputs, states)
        return results | {"z": results["z"] + (wrong if len(inputs["x"]) == 8 else 0.0)}

    with pytest.raises(BudgetError, match="output 'z'.*(\n.*)*'n': 8"):
        compare(function, broken)


def test_a_program_that_does_not_run_is_told_from_wrong_code():
    with pytest.raises(CompileError, match="does not run.*(\n.*)*'n': 8.*(\n.*)*fix"):
        function = doubling(rows=5)
        compare(function, lambda inputs, states: run(function, inputs, states))


def test_errors_are_relative_to_the_scale():
    expected = torch.tensor([100.0, 1.0, math.inf])
    assert relative_error(torch.tensor([100.0, 1.1, math.inf]), expected) == pytest.approx(1e-3)
    assert relative_error(torch.tensor([100.0, 1.0, 5.0]), expected) == math.inf
    assert relative_error(torch.tensor([1, 2]), torch.tensor([1, 3])) == math.inf
