"""Reshapes and permutes: one normal form, pushed down past what does not mind them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rewriting import B, T, names, program_of, rewritten

from tersor.ir import Range, Value
from tersor.ir.canonicalize.layout import RULES, Layout, trace

X = {"x": Value("float32", (B, T, 12))}


def split(b, x, heads=3):
    return b.permute(b.reshape(x, shape=(B, T, heads, 12 // heads)), dims=(0, 2, 1, 3))


def merge(b, x):
    return b.reshape(b.permute(x, dims=(0, 2, 1, 3)), shape=(B, T, 12))


def test_splitting_and_merging_heads_cancels():
    program = program_of(lambda b, x: merge(b, split(b, x)), X)
    rewritten(program, RULES)
    assert names(program) == []


def test_a_detour_over_flattened_tokens_and_time_first_cancels():
    def detour(b, x):
        y = b.reshape(b.permute(x, dims=(1, 0, 2)), shape=(T, B * 3, 4))
        y = b.reshape(b.permute(y, dims=(1, 0, 2)), shape=(B, 3, T, 4))
        return merge(b, y)

    program = program_of(detour, X)
    rewritten(program, RULES)
    assert names(program) == []


def test_merging_other_heads_than_were_split_stays():
    program = program_of(lambda b, x: b.reshape(split(b, x), shape=(B, T, 12)), X)
    rewritten(program, RULES)
    assert names(program) == ["reshape", "permute", "reshape"]


def test_a_permute_of_axes_of_size_one_is_a_reshape():
    program = program_of(lambda b, x: b.permute(b.reshape(x, shape=(B, T, 1, 12)), dims=(0, 2, 1, 3)), X)
    rewritten(program, RULES)
    assert names(program) == ["reshape"]


def test_a_scalar_has_no_last_axis_to_keep():
    program = program_of(
        lambda b, x: b.mul(b.reshape(x, shape=()), b.parameter("two", torch.tensor(2.0))),
        {"x": Value("float32", (1,))},
    )
    rewritten(program, RULES)
    assert names(program) == ["reshape", "mul"]


def test_moves_sink_below_pointwise_and_rowwise_operations():
    def model(b, x):
        w = b.parameter("w", torch.randn(5, 12))
        y = b.gelu(b.linear(b.reshape(x, shape=(B * T, 12)), w))
        return b.add(b.reshape(y, shape=(B, T, 5)), 1.0)

    program = program_of(model, X)
    rewritten(program, RULES)
    assert names(program) == ["linear", "gelu", "add"]


def test_moves_of_both_operands_sink_below_a_sum():
    program = program_of(
        lambda b, x: b.add(b.permute(x, dims=(1, 0, 2)), b.permute(b.neg(x), dims=(1, 0, 2))), X
    )
    rewritten(program, RULES)
    assert names(program) == ["neg", "add", "permute"]


def test_joined_axes_sink_below_what_broadcasts_over_them():
    def model(b, x, y):
        x = b.reshape(x, shape=(B * 3, T, 4))
        return b.add(x, b.reshape(y, shape=(B * 3, 1, 4)))

    inputs = {"x": Value("float32", (B, 3, T, 4)), "y": Value("float32", (B, 3, 4))}
    program = program_of(model, inputs)
    rewritten(program, RULES)
    assert names(program) == ["reshape", "add", "reshape"]
    assert str(program.main.calls("add")[0].meta["value"]) == "float32[batch, 3, length, 4]"


def test_a_lost_leading_axis_of_one_comes_back():
    def model(b, x):
        return b.mul(b.reshape(b.mul(x, 0.5), shape=(7, 8)), b.add(b.tanh(x), 1.0))

    program = program_of(model, {"x": Value("float32", (1, 7, 8))}, {})
    rewritten(program, RULES)
    assert "reshape" not in names(program)


def test_what_differs_along_a_part_of_an_axis_keeps_it_joined():
    def model(b, x, y):
        return b.add(b.reshape(x, shape=(2, 3, T, 4)), y)

    inputs = {"x": Value("float32", (6, T, 4)), "y": Value("float32", (3, T, 4))}
    program = program_of(model, inputs)
    rewritten(program, RULES)
    assert names(program) == ["reshape", "add"]


def test_products_part_a_batch_that_both_operands_joined():
    def model(b, x, y):
        x, y = (
            b.reshape(x, shape=(B * 3, T, 4)),
            b.reshape(b.permute(y, dims=(0, 1, 3, 2)), shape=(B * 3, 4, T)),
        )
        return b.reshape(b.matmul(x, y), shape=(B, 3, T, T))

    inputs = {"x": Value("float32", (B, 3, T, 4)), "y": Value("float32", (B, 3, T, 4))}
    program = program_of(model, inputs)
    rewritten(program, RULES)
    assert names(program) == ["permute", "matmul"]


def test_sums_part_a_batch_that_both_operands_joined():
    """The operands are arranged differently behind the batch, so one move cannot stand for both."""
    square = {"x": Value("float32", (B, 3, T, T))}

    def model(b, x):
        joined = b.reshape(x, shape=(B * 3, T, T))
        return b.reshape(b.add(joined, b.permute(joined, dims=(0, 2, 1))), shape=(B, 3, T, T))

    program = program_of(model, square)
    rewritten(program, RULES)
    assert names(program) == ["permute", "add"]


def test_a_gather_parts_a_batch_that_was_joined():
    inputs = {"x": Value("float32", (B, 3, T, 12)), "i": Value("int64", (B, 3, T, 5))}

    def model(dim):
        def gather(b, x, i):
            x, i = b.reshape(x, shape=(B * 3, T, 12)), b.reshape(i, shape=(B * 3, T, 5))
            return b.gather(x, i, dim=dim)

        return gather

    program = program_of(model(2), inputs)
    rewritten(program, RULES)
    assert names(program) == ["gather", "reshape"] and program.main.calls("gather")[0].kwargs["dim"] == 3


def test_what_was_expanded_is_moved_first():
    program = program_of(
        lambda b, x: b.permute(b.expand(x, shape=(B, 5, 12)), dims=(1, 0, 2)),
        {"x": Value("float32", (B, 1, 12))},
        {"batch": Range(1, 4)},
    )
    rewritten(program, RULES)
    assert names(program) == ["reshape", "expand"]


def test_an_expanded_axis_that_is_joined_with_another_stays():
    def model(b, x):
        return b.reshape(b.expand(x, shape=(B, 2, 12)), shape=(B, 24))

    program = program_of(model, {"x": Value("float32", (B, 1, 12))}, {"batch": Range(1, 4)})
    rewritten(program, RULES)
    assert names(program) == ["expand", "reshape"]


def test_a_linear_does_not_let_a_move_of_its_own_axis_through():
    def model(b, x):
        return b.linear(b.permute(x, dims=(0, 2, 1)), b.parameter("w", torch.randn(5, 7)))

    program = program_of(model, {"x": Value("float32", (B, 7, 12))})
    report = rewritten(program, RULES)
    assert names(program) == ["permute", "linear"]
    assert any("last axis" in e.reason for e in report.skipped)


def test_slices_lift_above_moves():
    def model(b, x):
        y = b.permute(b.reshape(x, shape=(B, T, 3, 4)), dims=(2, 0, 1, 3))
        return b.reshape(b.slice(y, dim=0, start=1, end=2), shape=(B, T, 4))

    program = program_of(model, X)
    rewritten(program, RULES)
    (node,) = program.main.calls()
    assert node.target.name == "slice" and (node.kwargs["start"], node.kwargs["end"]) == (4, 8)


def test_a_slice_across_heads_stays():
    program = program_of(lambda b, x: b.slice(split(b, x), dim=3, start=0, end=2), X)
    rewritten(program, RULES)
    assert names(program) == ["reshape", "permute", "slice"]


@pytest.mark.parametrize("shape", [(B * T, 12), (B, T * 12), (B, T, 2, 6), (1, B, T, 12, 1), (B * T * 12,)])
def test_layouts_follow_symbolic_reshapes_and_back(shape):
    layout = Layout.of((B, T, 12)).reshape(shape)
    assert layout.shape(layout.result) == shape
    back = layout.reshape((B, T, 12))
    assert back.result == back.source


def test_a_reshape_across_factors_has_no_layout():
    assert Layout.of((6, 4)).reshape((4, 6)) is None
    program = program_of(lambda b, x: b.reshape(x, shape=(4, 6)), {"x": Value("float32", (6, 4))})
    source, _ = trace(program.main.calls()[0])
    assert source.op == "placeholder" or source.target.name == "reshape"
    rewritten(program, RULES)
    assert names(program) == ["reshape"]


@st.composite
def chains(draw):
    """A shape, and moves of a tensor of that shape."""
    factors = draw(st.lists(st.sampled_from([1, 2, 3, 4]), min_size=1, max_size=5))
    moves, current = [], factors
    for _ in range(draw(st.integers(1, 5))):
        if draw(st.booleans()):
            dims = draw(st.permutations(range(len(current))))
            moves.append(("permute", tuple(dims)))
            current = [current[d] for d in dims]
        else:
            current = _regrouped(draw, current)
            moves.append(("reshape", tuple(current)))
    return tuple(factors), moves


def _regrouped(draw, shape):
    """Neighbours merged, axes split, ones put in."""
    result = []
    for size in shape:
        action = draw(st.sampled_from(["keep", "merge", "split", "one"]))
        if action == "merge" and result:
            result[-1] *= size
        elif action == "split" and size % 2 == 0:
            result += [2, size // 2]
        else:
            result += [1, size] if action == "one" else [size]
    return result


@settings(max_examples=150)
@given(chains())
def test_any_chain_keeps_its_meaning_and_needs_three_moves_at_most(chain):
    shape, moves = chain

    def model(b, x):
        for kind, argument in moves:
            x = b.permute(x, dims=argument) if kind == "permute" else b.reshape(x, shape=argument)
        return x

    program = program_of(model, {"x": Value("float32", shape)}, {})
    rewritten(program, RULES)
    assert len(names(program)) <= 3
