"""Every rule of a well-formed program: broken alone it is named, and all that are broken are listed at once."""

from __future__ import annotations

import pytest
import small_models
import torch

from tersor.errors import ProgramError
from tersor.ir import Dim, ParameterStore, Program, Range, Value, verify

N = Dim.symbol("n")


def tiny() -> Program:
    program = Program()
    function = program.add_function("main", {"n": Range(1, 9)})
    x = function.add_input("x", Value("float32", (N, 4)))
    build = function.builder()
    y = build.linear(x, build.parameter("w", torch.ones(4, 4)), site="layer")
    y.meta["source"] = "model.py:7"
    function.set_outputs({"y": build.gelu(y), "z": build.neg(y)})
    return program


def only(program, name):
    (node,) = program.main.calls(name)
    return node


@pytest.mark.parametrize("name", small_models.ALL)
def test_models_are_well_formed(name):
    verify(small_models.ALL[name]())


def _drop_value(program):
    del only(program, "gelu").meta["value"]


def _stale_shape(program):
    only(program, "gelu").meta["value"] = Value("float32", (N, 5))


def _stale_parameter(program):
    program.parameters["w"] = torch.ones(4, 4, dtype=torch.float64)


def _misfit(program):
    program.parameters["w"] = torch.ones(4, 5)
    only(program, "linear").args[1].meta["value"] = Value("float32", (4, 5))


def _no_parameter(program):
    del program.parameters["w"]


def _unknown_dimension(program):
    del program.main.dims["n"]


def _unknown_dimension_in_attribute(program):
    build = program.main.builder()
    node = build.slice(only(program, "gelu"), dim=0, start=Dim.symbol("m"), end=Dim.symbol("m") + 1)
    program.main.set_outputs({"y": node})


def _unbound_dimension(program):
    program.main.dims["m"] = Range(1, 2)
    x = program.main.add_input("more", Value("float32", (Dim.symbol("m") * 2,)))
    program.main.set_outputs({"y": x})


def _no_output(program):
    program.main.graph.erase_node(program.main.output_node)


def _two_outputs(program):
    program.main.graph.output((only(program, "gelu"),))


def _results_not_nodes(program):
    program.main.output_node.args = ((only(program, "gelu"), 1.0),)


def _names_and_results(program):
    program.main.outputs = ("y",)


def _same_names(program):
    program.main.outputs = ("y", "y")


def _order(program):
    only(program, "gelu").append(only(program, "linear"))


def _not_dialect(program):
    only(program, "gelu").target = torch.relu


def _method(program):
    only(program, "gelu").op = "call_method"


def _bad_attribute(program):
    only(program, "gelu").kwargs = {"approximate": "tanh"}


def _bad_operands(program):
    only(program, "gelu").args = ()


def _same_site(program):
    only(program, "gelu").meta["site"] = "layer"


def _same_input(program):
    program.main.add_input("x", Value("float32", (N, 4)))


def _other_store(program):
    program.main.parameters = ParameterStore(dict(program.parameters))


def _renamed(program):
    program.main.name = "other"


def _example_outside(program):
    program.main.example = {"n": program.main.dims["n"].max + 1}


def _slice_outside(program):
    build = program.main.builder()
    program.main.set_outputs({"y": build.slice(only(program, "gelu"), dim=0, start=N - 2, end=N - 1)})


VIOLATIONS = {
    "no value": (_drop_value, r"%gelu: has no value metadata"),
    "stale shape": (_stale_shape, r"%gelu: says float32\[n, 5\], its operands give float32\[n, 4\]"),
    "stale parameter": (_stale_parameter, r"%w: says float32\[4, 4\], the parameter is float64\[4, 4\]"),
    "operands do not fit": (
        _misfit,
        r"%linear \(site layer, source model.py:7\): linear: x float32\[n, 4\], weight",
    ),
    "no such parameter": (_no_parameter, r"%w: reads the parameter 'w', which does not exist"),
    "dimension without a range": (_unknown_dimension, r"%x: uses dimensions without a range: n"),
    "the same in an attribute": (
        _unknown_dimension_in_attribute,
        r"%slice_1: uses dimensions without a range: m",
    ),
    "dimension bound by no input": (_unbound_dimension, r"'main': 'm' is alone in no input's shape"),
    "no output": (_no_output, "'main' has no output node at its end"),
    "two outputs": (_two_outputs, "'main' has no output node at its end"),
    "a number as result": (_results_not_nodes, r"the results are \(gelu, 1.0\), not a tuple of nodes"),
    "names and results": (_names_and_results, r"2 results, output names \['y'\]"),
    "output names repeat": (_same_names, r"2 results, output names \['y', 'y'\]"),
    "order": (_order, "%gelu reads a value that is defined later"),
    "foreign function": (_not_dialect, "%gelu: call_function of .* is not a dialect operation"),
    "foreign node": (_method, "%gelu: call_method of .* is not a dialect operation"),
    "unknown attribute": (_bad_attribute, "%gelu: gelu: got an unexpected keyword argument 'approximate'"),
    "missing operand": (_bad_operands, "%gelu: gelu: missing a required argument: 'x'"),
    "site names two nodes": (_same_site, "site 'layer' names 2 nodes"),
    "inputs repeat": (_same_input, "2 inputs called 'x'"),
    "function's name": (_renamed, "function 'main' calls itself 'other'"),
    "example outside": (_example_outside, "'main': the example has size .* for 'n', outside its range"),
    "slice outside": (_slice_outside, r"%slice_1: reads n - 2 to n - 1 of n, which is outside at n = 1"),
    "another store": (_other_store, "reads another program's parameters"),
}


@pytest.mark.parametrize("violation", VIOLATIONS)
def test_violation_is_named(violation):
    program = tiny()
    verify(program)
    break_it, said = VIOLATIONS[violation]
    break_it(program)
    with pytest.raises(ProgramError, match=said):
        verify(program)


def test_a_declared_dimension_need_not_be_used():
    program = tiny()
    program.main.dims["unused"] = Range(1, 2)
    verify(program)


def test_all_violations_are_listed_at_once():
    program = tiny()
    second = program.add_function("second")
    second.set_outputs({"y": second.builder().full(shape=(1,), value=0, dtype="int64")})
    second.outputs = ()
    _drop_value(program)
    _same_site(program)
    _unknown_dimension(program)
    with pytest.raises(ProgramError) as caught:
        verify(program)
    said = str(caught.value)
    for part in ("%gelu", "site 'layer'", "%x", "'second'", "violations"):
        assert part in said


def test_a_long_list_is_cut():
    program = tiny()
    build = program.main.builder()
    for _ in range(30):
        del build.neg(only(program, "linear")).meta["value"]
    with pytest.raises(ProgramError, match=r"30 violations(.|\n)*and 10 more"):
        verify(program)
