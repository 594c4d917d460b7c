"""Rows that no result reads are not computed."""

from __future__ import annotations

import pytest
import torch

from tersor.ir.costs import cost
from tersor.passes import Pipeline
from tersor.passes.cleanup.unread_rows import RemoveUnreadRows
from tests.passes.check_pass import apply, check_pass
from tests.passes.programs import Transformer, Weights, program


def classifier(early: bool, mask: str | None = "padding", **attention):
    """A post-norm block of which the first row is read; ``early``: that row alone is computed."""

    def emit(build, x, mask):
        weights = Weights(build)
        norm, up = weights("norm", 16), weights("up", 32, 16)
        row = build.slice(x, dim=1, start=0, end=1) if early else x
        k, v = (weights.linear(x, name, 16, 16) for name in ("k", "v"))
        q = weights.linear(row, "q", 16, 16)
        mixed = build.attention(q, k, v, mask, heads=2, kv_heads=2, scale=0.3, **attention)
        joined = build.layer_norm(build.add(row, weights.linear(mixed, "o", 16, 16)), norm, None, eps=1e-5)
        inner = build.gelu(build.linear(joined, up))
        y = build.add(build.linear(inner, weights("down", 16, 32)), joined)
        return {"y": y if early else build.slice(y, dim=1, start=0, end=1)}

    return program(emit, mask=mask)


def test_a_classifier_computes_one_row_of_its_last_layer():
    after = check_pass(
        RemoveUnreadRows(), classifier(False), classifier(True), unmatched=Transformer(layers=1).build()
    )
    before, now = cost(classifier(False)).macs, cost(after).macs
    rows, width = 4 * 32, 16
    keys_and_values, row = 2 * rows * width * width, 4 * (2 * width * width + 2 * 32 * width + 2 * 32 * width)
    assert now == keys_and_values + row < before / 2.5


@pytest.mark.parametrize("mask", ["queries", None])
def test_masks_with_rows_are_cut_with_the_queries(mask):
    after = check_pass(
        RemoveUnreadRows(), classifier(False, mask), None, unmatched=Transformer(layers=1).build()
    )
    attention = after.main.calls("attention")[0]
    assert attention.meta["value"].shape[1] == 1
    if mask:
        assert attention.args[3].meta["value"].shape[2] == 1


def test_scales_of_groups_are_cut_with_their_codes():
    def emit(build, x, mask):
        scale = build.dynamic_scale(x, group=16)
        codes = build.quantize(x, scale, 128, dtype="uint8", group=16)
        weight = build.parameter("w", torch.randint(-128, 128, (24, 48), dtype=torch.int8))
        y = build.gelu(build.emit("grouped_integer_linear", codes, weight, scale, site="layer"))
        return {"y": build.slice(y, dim=1, start=0, end=1)}

    made, x = program(emit, width=48), torch.randn(2, 5, 48)
    after, _ = Pipeline([RemoveUnreadRows()]).run(made)
    torch.testing.assert_close(after(x=x)["y"], made(x=x)["y"])
    (product,) = after.main.calls("grouped_integer_linear")
    assert [operand.meta["value"].shape[1] for operand in (product.args[0], product.args[2])] == [1, 1]


def test_a_cast_that_others_read_is_made_again_for_the_rows():
    """Code generation looks for it right before a layer."""

    def emit(build, x, mask):
        weights = Weights(build)
        rounded = build.cast(x, dtype="bfloat16")
        first, second = (
            build.linear(build.cast(rounded, dtype="float32"), weights(name, 8, 16)) for name in "ab"
        )
        return {"row": build.slice(first, dim=1, start=0, end=1), "all": second}

    after = apply(RemoveUnreadRows(), program(emit))
    rows, whole = after.main.calls("linear")
    assert rows.args[0].target.name == whole.args[0].target.name == "cast"
    assert rows.meta["value"].shape[1] == 1 != whole.meta["value"].shape[1]


@pytest.mark.parametrize("row", ["first", "last"])
def test_causal_attention_moves_for_rows_at_the_end_alone(row):
    """Queries are counted from the end: cutting the last ones off would shift the others."""

    def emit(build, x, mask):
        weights = Weights(build)
        q, k, v = (weights.linear(x, name, 16, 16) for name in ("q", "k", "v"))
        mixed = build.attention(q, k, v, heads=2, kv_heads=2, scale=0.3, causal=True)
        length = x.meta["value"].shape[1]
        start, end = (0, 1) if row == "first" else (length - 1, length)
        return {"y": build.slice(build.relu(mixed), dim=1, start=start, end=end)}

    after = apply(RemoveUnreadRows(), program(emit))
    assert (after.main.calls("attention")[0].meta["value"].shape[1] == 1) is (row == "last")
    assert after.main.calls("relu")[0].meta["value"].shape[1] == 1


def test_values_that_others_read_stay_whole():
    def emit(build, x, mask):
        whole = build.exp(x)
        return {"row": build.slice(whole, dim=1, start=0, end=1), "all": build.relu(whole)}

    made = program(emit)
    assert apply(RemoveUnreadRows(), made) is made


def test_operands_that_are_repeated_are_not_cut():
    def emit(build, x, mask):
        build_row = build.parameter("row", torch.randn(16))
        column = build.mean(x, dims=(1,), keepdim=True)
        y = build.mul(build.add(x, build_row), column)
        return {"y": build.slice(y, dim=1, start=0, end=1)}

    after = apply(RemoveUnreadRows(), program(emit))
    assert [n.target.name for n in after.main.calls()] == ["slice", "mean", "add", "mul"]


@pytest.mark.parametrize("dim", [2, -1])
def test_columns_stop_at_what_mixes_them(dim):
    def emit(build, x, mask):
        y = build.gelu(build.softmax(x, dim=-1))
        return {"y": build.slice(y, dim=dim, start=0, end=4)}

    after = apply(RemoveUnreadRows(), program(emit))
    assert [n.target.name for n in after.main.calls()] == ["softmax", "slice", "gelu"]


def test_layers_in_skip_are_computed_whole():
    after = apply(RemoveUnreadRows(skip="o"), classifier(False))
    assert after.main.calls("attention")[0].meta["value"].shape[1] != 1
    assert after.main.calls("layer_norm")[0].meta["value"].shape[1] == 1


def test_parameters_are_cut_where_they_are_read():
    def emit(build, x, mask):
        mean = build.mean(x, dims=(1,), keepdim=True)
        y = build.add(mean, build.parameter("positions", torch.randn(1, 32, 16)))
        return {"y": build.slice(y, dim=1, start=0, end=1)}

    after = apply(RemoveUnreadRows(), program(emit))
    assert after.main.calls("add")[0].meta["value"].shape[1] == 1
    assert after.main.calls("slice")[0].args[0].op == "get_attr"
