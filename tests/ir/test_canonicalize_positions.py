"""Integer arithmetic over positions, look-ups by position, and values that depend on no input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rewriting import B, T, canonical, names, program_of, rewritten

from tersor.errors import CaptureError
from tersor.ir import Dim, Program, Range, Value, run
from tersor.ir.canonicalize import canonicalize, indices
from tersor.ir.canonicalize.affine import Affine, Positions, Predicate, from_tensor, lower_bound
from tersor.ir.canonicalize.constants import fold_constants
from tersor.ir.matching import apply_rules

X = {"x": Value("float32", (B, T, 8))}
IDS = {"ids": Value("int64", (B, T))}


def read(make, dims=None):
    program = program_of(lambda b, x: make(b), {"x": Value("float32", (B, T))}, dims)
    return Positions(program.main).read(program.main.results[0]), program


# -- the analysis


def test_a_tower_of_positions_is_affine():
    def tower(b):
        rows = b.reshape(b.add(b.mul(b.arange(end=B), 3), 1), shape=(B, 1))
        return b.sub(b.expand(b.arange(end=T), shape=(B, T)), b.expand(rows, shape=(B, T)))

    affine, _ = read(tower)
    assert affine == Affine((B, T), -1, {0: -3, 1: 1})


def test_slices_and_sizes_enter_offset_and_slope():
    affine, _ = read(
        lambda b: b.mul(
            b.slice(b.arange(end=9), dim=0, start=2, end=8, step=2), b.full(shape=(), value=T, dtype="int64")
        )
    )
    assert affine == Affine((3,), 2 * T, {0: 2 * T})


@st.composite
def towers(draw):
    """A random integer tower as a function of a builder."""
    depth = draw(st.integers(1, 4))
    steps = [
        (
            draw(st.sampled_from(["add", "sub", "mul", "neg", "slice", "permute", "expand", "reshape"])),
            draw(st.integers(-3, 3)),
        )
        for _ in range(depth)
    ]

    def tower(b):
        x = b.add(b.reshape(b.arange(end=T), shape=(T, 1)), b.mul(b.arange(end=5), 2))
        for kind, number in steps:
            shape = x.meta["value"].shape
            if kind in ("add", "sub", "mul"):
                x = b.emit(kind, x, number)
            elif kind == "neg":
                x = b.sub(x, b.neg(x))
            elif kind == "slice" and isinstance(shape[-1], int) and shape[-1] > 2:
                x = b.slice(x, dim=len(shape) - 1, start=1, end=shape[-1])
            elif kind == "permute":
                x = b.permute(x, dims=tuple(reversed(range(len(shape)))))
            elif kind == "expand":
                x = b.expand(x, shape=(2, *shape))
            elif kind == "reshape":
                x = b.reshape(x, shape=(1, *shape, 1))
        return x

    return tower


@settings(max_examples=80)
@given(towers())
def test_what_is_read_is_what_is_computed(tower):
    affine, program = read(tower)
    assert isinstance(affine, Affine)
    for length in (1, 6):
        actual = run(program.main, {"x": torch.zeros(2, length)})["y"]
        sizes = {"batch": 2, "length": length}

        def at(value, sizes=sizes):
            return value.evaluate(sizes) if isinstance(value, Dim) else value

        expected = torch.full(actual.shape, at(affine.offset))
        for axis, slope in affine.coefficients.items():
            ramp = torch.arange(actual.shape[axis]) * at(slope)
            expected = expected + ramp.reshape([-1 if i == axis else 1 for i in range(actual.ndim)])
        assert torch.equal(actual, expected)


def test_bounds_are_certain_or_unknown():
    dims = {"length": Range(2, 10)}
    length = Dim.symbol("length")
    assert lower_bound(length * 3 - 1, dims) == 5
    assert lower_bound(5 - length, dims) == -5
    assert Affine((length,), 0, {0: 1}).at_least_zero(dims) is True
    assert Affine((length,), -length, {0: 1}).at_least_zero(dims) is False
    assert Affine((length,), -1, {0: 1}).at_least_zero(dims) is None
    assert Affine((length,), 9, {0: -1}).at_least_zero(dims) is True
    assert Affine((length,), 8, {0: -1}).at_least_zero(dims) is None


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (torch.arange(5)[None] * 2 + 3, Affine((1, 5), 3, {1: 2})),
        (torch.zeros(2, 3, dtype=torch.int64), Affine((2, 3), 0, {})),
        (torch.tensor([0, 1, 3]), None),
        (torch.ones(2, 2, dtype=torch.bool), Predicate(Affine((2, 2), 0, {}))),
        (torch.ones(3, 3, dtype=torch.bool).tril(), Predicate(Affine((3, 3), 0, {0: 1, 1: -1}))),
        (torch.ones(1, 3, 4, dtype=torch.bool).tril(1), Predicate(Affine((1, 3, 4), 1, {1: 1, 2: -1}))),
        (torch.ones(3, 3, dtype=torch.bool).triu(1), Predicate(Affine((3, 3), -1, {0: -1, 1: 1}))),
        (torch.eye(3, dtype=torch.bool), None),
        (torch.arange(3.0), None),
    ],
)
def test_stored_tables(tensor, expected):
    assert from_tensor(tensor) == expected


def test_a_part_of_a_stored_table_is_affine_where_the_whole_is_not():
    pairs = torch.stack((torch.zeros(5, dtype=torch.int64), torch.arange(5)), -1)
    assert from_tensor(pairs) is None
    affine, _ = read(lambda b: b.slice(b.parameter("pairs", pairs), dim=1, start=1, end=2))
    assert affine == Affine((5, 1), 0, {0: 1})
    affine, _ = read(lambda b: b.slice(b.parameter("primes", torch.tensor([2, 3, 5, 7] * 10)), dim=0, end=T))
    assert affine is None


# -- look-ups


def test_positions_embedded_are_a_slice_of_the_table():
    def model(b, x):
        ids = b.slice(b.parameter("position_ids", torch.arange(64)[None]), dim=1, start=0, end=T)
        return b.add(x, b.embedding(b.add(ids, 2), b.parameter("table", torch.randn(64, 8))))

    program = program_of(model, X)
    canonical(program)
    assert names(program) == ["slice", "add"]
    node = program.main.calls("slice")[0]
    assert (node.kwargs["start"], node.kwargs["end"]) == (2, T + 2)
    assert list(program.parameters) == ["table"], "not copied"


def test_positions_beyond_the_table_are_refused():
    def model(b, x):
        return b.add(x, b.embedding(b.add(b.arange(end=T), 2), b.parameter("table", torch.randn(41, 8))))

    with pytest.raises(CaptureError) as caught:
        canonicalize(program_of(model, X))
    assert "41 rows" in str(caught.value) and "length 40" in str(caught.value)


def test_positions_beyond_another_input_are_refused():
    """A mask of two rows cannot serve a batch of up to four: torch.export does not notice, reads past its end."""

    def model(b, x, mask):
        rows = b.add(b.reshape(b.mul(b.arange(end=B), 8), shape=(B, 1)), b.arange(end=8))
        return b.add(x, b.index_select(b.reshape(mask, shape=(16,)), rows, dim=0))

    inputs = {"x": Value("float32", (B, 8)), "mask": Value("float32", (2, 8))}
    with pytest.raises(CaptureError) as caught:
        canonicalize(program_of(model, inputs))
    assert "16 rows" in str(caught.value) and "batch 4" in str(caught.value)


def test_one_row_for_all_is_broadcast():
    def model(b, x):
        types = b.expand(b.full(shape=(1, 1), value=1, dtype="int64"), shape=(B, T))
        return b.add(x, b.embedding(types, b.parameter("types", torch.randn(2, 8))))

    program = program_of(model, X)
    canonical(program)
    assert names(program) == ["add"]


def test_ids_from_an_input_stay_embedded():
    program = program_of(lambda b, ids: b.embedding(b.add(ids, 1), b.parameter("t", torch.randn(9, 4))), IDS)
    report = rewritten(program, indices.RULES)
    assert names(program) == ["add", "embedding"]
    assert any("depends on inputs" in e.reason for e in report.skipped)


def gather_all(b, x, step=1):
    rows = b.reshape(b.mul(b.arange(end=B), b.full(shape=(), value=T, dtype="int64")), shape=(B, 1))
    index = b.add(rows, b.mul(b.arange(end=T), step))
    return b.index_select(b.reshape(x, shape=(B * T,)), index, dim=0)


def test_a_gather_of_everything_in_order_is_a_reshape():
    program = program_of(gather_all, {"x": Value("int64", (B, T))})
    canonical(program)
    assert names(program) == []


def test_an_index_that_counts_from_the_end_is_no_slice():
    program = program_of(lambda b, x: b.index_select(x, b.parameter("last", torch.tensor([-1])), dim=2), X)
    apply_rules(program.main, indices.RULES)
    assert names(program) == ["index_select"]


def test_a_gather_in_another_order_stays():
    program = program_of(lambda b, x: gather_all(b, x, step=0), {"x": Value("int64", (B, T))})
    canonical(program)
    assert "index_select" in names(program)


def test_negative_indices_are_wrapped_only_where_they_may_occur():
    def model(b, ids, known):
        index = b.arange(end=T) if known else ids
        wrapped = b.where(b.lt(index, 0), b.add(index, 9), index)
        return b.add(
            b.index_select(b.parameter("t", torch.randn(40)), wrapped, dim=0), b.cast(ids, dtype="float32")
        )

    program = program_of(lambda b, ids: model(b, ids, True), IDS)
    canonical(program)
    assert "where" not in names(program) and "index_select" not in names(program)
    program = program_of(lambda b, ids: model(b, ids, False), IDS)
    canonical(program)
    assert "where" in names(program)


# -- constants


def test_positions_along_an_axis_of_one_are_no_positions():
    """A slice of one element of 0, 1, 2, ...: the axis that goes has a stride of its own."""

    def model(b, x):
        steps = b.reshape(b.arange(end=6), shape=(2, 3))
        index = b.reshape(b.slice(steps, dim=0, start=1, end=2), shape=(3,))
        return b.index_select(x, b.expand(index, shape=(3,)), dim=1)

    program = program_of(model, {"x": Value("float32", (2, 8))})
    canonical(program)
    x = torch.arange(16.0).reshape(2, 8)
    assert torch.equal(next(iter(program(x=x).values())), x[:, 3:6])


def test_constants_fold_and_dead_parameters_go():
    def model(b, x):
        scale = b.sqrt(b.add(b.mul(b.parameter("w", torch.rand(8)), 2.0), 1.0))
        return b.mul(x, scale)

    program = program_of(model, X)
    canonical(program)
    assert names(program) == ["mul"] and len(program.parameters) == 1 and "w" not in program.parameters


def test_a_constant_keeps_the_name_of_the_only_parameter_it_is_made_from():
    def model(b, x):
        return b.rms_norm(x, b.add(b.cast(b.parameter("norm.weight", torch.rand(8)), dtype="float32"), 1.0))

    program = program_of(model, X)
    canonical(program)
    assert list(program.parameters) == ["norm.weight"]


def test_tables_that_are_computed_twice_are_stored_once():
    def model(b, x):
        for name in ("first", "second"):
            angles = b.mul(b.cast(b.arange(end=T), dtype="float32"), b.parameter(name, torch.tensor([0.5])))
            x = b.mul(x, b.reshape(b.cos(angles), shape=(1, T, 1)))
        return x

    program = program_of(model, X)
    canonical(program)
    assert names(program) == ["slice", "mul", "mul"] and len(program.parameters) == 1


def test_a_constant_larger_than_what_it_is_made_from_stays():
    def model(b, x):
        outer = b.mul(b.parameter("u", torch.randn(400, 1)), b.parameter("v", torch.randn(1, 400)))
        return b.mul(x, outer)

    program = program_of(model, {"x": Value("float32", (400, 400))})
    notes = canonical(program)
    assert names(program) == ["mul", "mul"]
    assert any("640000 bytes" in n for n in notes)


def test_a_constant_whose_making_takes_too_much_stays():
    def model(b, x):
        huge = b.exp(b.full(shape=(1 << 20, 1 << 20), value=0.5, dtype="float32"))
        return b.add(x, b.sum(huge, dims=(0, 1)))

    program = program_of(model, {"x": Value("float32", (4,))})
    notes = canonicalize(program)  # which nobody can run
    assert "sum" in names(program)
    assert any("to compute it takes" in n for n in notes)


def test_a_table_over_a_dimension_is_made_for_its_maximum():
    def model(b, x):
        table = b.cos(b.mul(b.cast(b.arange(end=T), dtype="float32"), 0.1))
        return b.mul(x, b.reshape(table, shape=(1, T, 1)))

    program = program_of(model, X)
    canonical(program)
    assert names(program) == ["slice", "mul"]
    (table,) = program.parameters.values()
    assert tuple(table.value.shape) == (1, 40, 1)


def test_a_column_that_is_the_same_in_every_row_is_stored_once():
    program = Program()
    function = program.add_function("main", {"n": Range(1, 9)})
    n = Dim.symbol("n")
    function.add_input("x", Value("float32", (n,)))
    b = function.builder()
    table = b.full(shape=(n, 24), value=2, dtype="int32")
    function.set_outputs({"y": b.index_select(table, b.parameter("i", torch.tensor(3)), dim=1)})
    canonicalize(program)
    (stored,) = program.parameters.values()
    assert stored.tensor.tolist() == [2] and [node.target.name for node in function.calls()] == ["expand"]


def test_a_table_that_depends_on_the_size_itself_stays():
    def model(b, x):
        ramp = b.div(b.cast(b.arange(end=T), dtype="float32"), b.full(shape=(), value=T, dtype="int64"))
        return b.mul(x, b.reshape(ramp, shape=(1, T, 1)))

    program = program_of(model, X)
    notes = canonical(program)
    assert "arange" in names(program)
    assert any("depend on the size of length" in n for n in notes)


def test_a_value_over_two_dimensions_stays_with_a_note():
    def model(b, x):
        return b.add(
            x,
            b.sin(b.cast(b.add(b.reshape(b.arange(end=B), shape=(B, 1)), b.arange(end=T)), dtype="float32")),
        )

    program = program_of(model, {"x": Value("float32", (B, T))})
    notes = fold_constants(program.main)
    assert any("several dimensions: batch, length" in n for n in notes)


def test_the_same_program_in_static_form_has_the_same_operations():
    def model(b, x, length):
        ids = b.slice(b.parameter("ids", torch.arange(64)[None]), dim=1, start=0, end=length)
        return b.add(x, b.embedding(ids, b.parameter("table", torch.randn(64, 8))))

    dynamic = program_of(lambda b, x: model(b, x, T), X)
    static = program_of(lambda b, x: model(b, x, 7), {"x": Value("float32", (3, 7, 8))}, {})
    for program in (dynamic, static):
        canonical(program)
    assert (
        [n for n in names(dynamic) if n != "slice"] == [n for n in names(static) if n != "slice"] == ["add"]
    )
