"""The reference execution: sizes of dims, observers, other float types, memory."""

from __future__ import annotations

import weakref

import pytest
import small_models
import torch

from tersor.errors import InputError
from tersor.ir import Dim, Program, Range, Value, run
from tersor.ir.interpreter import bind_dims
from tersor.ir.samples import sample_inputs

A, B = Dim.symbol("a"), Dim.symbol("b")


def test_dims_are_read_off_the_inputs():
    values = {"x": Value("float32", (A, 3)), "y": Value("int64", (A + B, B))}
    assert bind_dims(values, {"x": torch.ones(2, 3), "y": torch.ones(7, 5)}) == {"a": 2, "b": 5}
    # a sum may come before its terms
    values = {"y": Value("int64", (A + B, B)), "x": Value("float32", (A, 3))}
    assert bind_dims(values, {"x": torch.ones(2, 3), "y": torch.ones(7, 5)}) == {"b": 5, "a": 2}


@pytest.mark.parametrize(
    ("x", "y", "said"),
    [
        (
            torch.ones(2, 4),
            torch.ones(2, 5),
            r"'x' has shape \[2, 4\]\n  why: .*float32\[a, 3\].*'y': \[2, 5\]",
        ),
        (
            torch.ones(2, 3),
            torch.ones(3, 5),
            r"'y' has shape \[3, 5\]\n  why: .*int64\[a, b\].*'x': \[2, 3\]",
        ),
        (torch.ones(2, 3), torch.ones(2, 5, 1), r"'y' has shape \[2, 5, 1\]"),
        (torch.ones(2, 3), None, "input 'y' is missing\n  fix: give y: int64"),
    ],
)
def test_inputs_that_do_not_fit(x, y, said):
    values = {"x": Value("float32", (A, 3)), "y": Value("int64", (A, B))}
    with pytest.raises(InputError, match=said):
        bind_dims(values, {"x": x} if y is None else {"x": x, "y": y})


def test_a_composite_dim_is_checked():
    values = {"x": Value("float32", (A, B)), "y": Value("int64", (A + B,))}
    with pytest.raises(InputError, match=r"'y' has shape \[6\]"):
        bind_dims(values, {"x": torch.ones(2, 3), "y": torch.ones(6)})


def chain(dtype="float32") -> Program:
    program = Program()
    function = program.add_function("main", {"a": Range(1, 9)})
    x = function.add_input("x", Value(dtype, (A, 4)))
    build = function.builder()
    y = build.linear(x, build.parameter("w", torch.ones(4, 4)))
    y = build.add(build.exp(build.neg(y)), build.full(shape=(A, 1), value=0.1, dtype="float32"))
    function.set_outputs({"x": x, "y": y, "again": y})
    return program


def test_results_by_name_inputs_and_repeats_included():
    program, x = chain(), torch.randn(3, 4)
    result = run(program.main, {"x": x})
    assert list(result) == ["x", "y", "again"]
    assert result["x"] is x and result["y"] is result["again"]
    torch.testing.assert_close(result["y"], torch.exp(-x.sum(1, keepdim=True)).expand(3, 4) + 0.1)


def test_observers_see_every_operation_in_order():
    program, seen = chain(), []
    result = run(
        program.main, {"x": torch.ones(1, 4)}, observe=lambda node, value: seen.append((node, value))
    )
    assert [node for node, _ in seen] == program.main.calls()
    assert all(Value("float32", tuple(value.shape)).rank == node.meta["value"].rank for node, value in seen)
    assert seen[-1][1] is result["y"]


def test_values_are_freed_at_their_last_use():
    program, alive, most = chain(), {}, []

    def observe(node, value):
        alive[node.target.name] = weakref.ref(value)
        most.append({name for name, ref in alive.items() if ref() is not None})

    run(program.main, {"x": torch.ones(1, 4)}, observe=observe)
    # what is observed, and its operands, are there; nothing else is
    assert most == [{"linear"}, {"linear", "neg"}, {"neg", "exp"}, {"exp", "full"}, {"exp", "full", "add"}]


def test_values_that_nobody_reads_are_freed():
    program = chain()
    dead = program.main.builder(before=program.main.calls("add")[0]).sin(program.main.calls("exp")[0])
    alive = {}

    def observe(node, value):
        alive[node] = weakref.ref(value)
        if node.target.name == "add":
            assert alive[dead]() is None

    run(program.main, {"x": torch.ones(1, 4)}, observe=observe)


def test_float64_mode_computes_all_floats_in_float64():
    program, kinds = chain(), set()
    x = torch.tensor([[0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)
    result = run(program.main, {"x": x}, dtype=torch.float64, observe=lambda n, v: kinds.add(v.dtype))
    assert kinds == {torch.float64}
    exact = torch.exp(-x.sum()) + 0.1
    assert (result["y"] - exact).abs().max() < 1e-15
    assert run(program.main, {"x": x.float()}, dtype=torch.float64)["x"].dtype == torch.float64


def test_float64_mode_takes_casts_to_any_float_type_along():
    program = Program()
    function = program.add_function("main")
    x = function.add_input("x", Value("float32", (3,)))
    build = function.builder()
    half = build.mul(build.cast(x, dtype="float16"), build.parameter("w", torch.ones(3, dtype=torch.float16)))
    function.set_outputs({"y": build.cast(half, dtype="float32"), "n": build.cast(x, dtype="int64")})
    x = torch.tensor([0.1, 1.5, 2.7], dtype=torch.float64)
    result = run(function, {"x": x}, dtype=torch.float64)
    assert torch.equal(result["y"], x)
    assert result["n"].tolist() == [0, 1, 2] and result["n"].dtype == torch.int64


def test_float64_mode_makes_floats_of_integers_in_float64():
    program = Program()
    function = program.add_function("main")
    n, m = (function.add_input(name, Value(dtype, (3,))) for name, dtype in (("n", "int64"), ("m", "bool")))
    build = function.builder()
    values = [build.minimum(n, 0.1), build.div(n, 3), build.sqrt(n), build.where(m, 0.5, -1.0)]
    weight = build.parameter("w", torch.ones(2, 3))
    function.set_outputs({f"y{i}": build.linear(value, weight) for i, value in enumerate(values)})
    n, m = torch.tensor([2**24 + 1, 2, 3]), torch.tensor([True, False, True])
    result = run(function, {"n": n, "m": m}, dtype=torch.float64)
    exact = [n.double().clamp(max=0.1), n.double() / 3, n.double().sqrt(), torch.where(m, 0.5, -1.0).double()]
    for value, expected in zip(result.values(), exact, strict=True):
        torch.testing.assert_close(value, expected.sum().expand(2), rtol=1e-15, atol=0)


@pytest.mark.parametrize(
    ("name", "at"),
    [("index_select", -1), ("embedding", 4), ("gather", 4), ("scatter", 9), ("cache_update", 4)],
)
def test_positions_outside_are_an_error_that_says_where(name, at):
    program = Program()
    function = program.add_function("main")
    x, index = (
        function.add_input("x", Value("float32", (4, 2))),
        function.add_input("i", Value("int64", (1, 2))),
    )
    build = function.builder()
    places = build.reshape(build.slice(index, dim=1, end=1), shape=(1,))
    made = {
        "index_select": lambda: build.index_select(x, index, dim=0),
        "embedding": lambda: build.embedding(index, x),
        "gather": lambda: build.gather(x, index, dim=0),
        "scatter": lambda: build.scatter(x, index, build.slice(x, dim=0, end=1), dim=0),
        "cache_update": lambda: build.cache_update(x, build.slice(x, dim=0, end=1), places, dim=0),
    }[name]()
    made.meta["module"] = "block.1"
    function.set_outputs({"y": made})
    with pytest.raises(InputError, match=rf"{name} reads or writes outside[^\n]*\n.*where: .*block.1"):
        run(function, {"x": torch.ones(4, 2), "i": torch.tensor([[at, 0]])})


def test_sampled_ids_lie_in_a_table_of_dynamic_rows():
    program = Program()
    function = program.add_function("main", {"a": Range(1, 9)})
    ids, table = (
        function.add_input("i", Value("int64", (50,))),
        function.add_input("t", Value("float32", (A, 3))),
    )
    function.set_outputs({"y": function.builder().embedding(ids, table)})
    for size in (1, 9):
        found = sample_inputs(function, {"a": size})["i"]
        assert 0 <= found.min() and found.max() == size - 1


@pytest.mark.parametrize("name", small_models.ALL)
def test_models_give_the_same_in_float64_up_to_rounding(name):
    function = small_models.ALL[name]().main
    for sizes in ({}, {"batch": 1, "length": 1}, {"batch": 2, "length": 5}):
        inputs = sample_inputs(function, {k: v for k, v in sizes.items() if k in function.dims})
        single, double = run(function, inputs), run(function, inputs, dtype=torch.float64)
        for key in single:
            assert double[key].dtype == torch.float64
            torch.testing.assert_close(single[key], double[key].float(), atol=1e-4, rtol=1e-4)


def test_gradients_flow_through_the_reference():
    program = chain()
    x = torch.ones(2, 4, requires_grad=True)
    run(program.main, {"x": x})["y"].sum().backward()
    assert x.grad.abs().sum() > 0
