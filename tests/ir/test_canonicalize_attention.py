"""Attention that is spelt out, shared key heads, scales, and masks taken apart."""

from __future__ import annotations

import pytest
import torch
from rewriting import B, T, canonical, names, program_of, rewritten, sample

from tersor.ir import Value, run
from tersor.ir.canonicalize import attention, canonicalize, masks
from tersor.ir.matching import apply_rules

X = {"x": Value("float32", (B, T, 8))}
MASKED = {"x": Value("float32", (B, T, 8)), "m": Value("int64", (B, T))}
LOWEST = torch.finfo(torch.float32).min


def heads(b, x, count=2):
    width = x.meta["value"].shape[-1]
    return b.permute(b.reshape(x, shape=(B, T, count, width // count)), dims=(0, 2, 1, 3))


def merged(b, x):
    batch, count, length, width = x.meta["value"].shape
    return b.reshape(b.permute(x, dims=(0, 2, 1, 3)), shape=(batch, length, count * width))


def spelt_out(b, x, change=lambda b, s: s, scale=0.5):
    q, k, v = heads(b, x), heads(b, b.mul(x, 2.0)), heads(b, b.neg(x))
    scores = b.mul(b.matmul(q, b.permute(k, dims=(0, 1, 3, 2))), scale)
    return merged(b, b.matmul(b.softmax(change(b, scores), dim=3), v))


def only_attention(program):
    (node,) = program.main.calls("attention")
    assert "matmul" not in names(program) and "softmax" not in names(program)
    return node


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_matmul_softmax_matmul_is_attention(scale):
    program = program_of(lambda b, x: spelt_out(b, x, scale=scale), X)
    canonical(program)
    node = only_attention(program)
    assert sorted(names(program)) == ["attention", "neg"]
    assert node.kwargs["scale"] == 2 * scale, "the keys' factor is folded too"
    assert (node.kwargs["heads"], node.args[3] if len(node.args) > 3 else None) == (2, None)


def test_attention_without_heads():
    def model(b, x):
        scores = b.div(b.matmul(x, b.permute(x, dims=(0, 2, 1))), 8**0.5)
        return b.matmul(b.softmax(scores, dim=-1), x)

    program = program_of(model, X)
    canonical(program)
    assert only_attention(program).kwargs["heads"] == 1 and len(names(program)) == 1


def hide(b, s, m, number):
    seen = b.reshape(b.cast(m, dtype="bool"), shape=(B, 1, 1, T))
    return b.where(seen, s, number)


@pytest.mark.parametrize("number", [float("-inf"), LOWEST, -1e9])
def test_scores_replaced_where_hidden_become_a_boolean_mask(number):
    program = program_of(lambda b, x, m: spelt_out(b, x, lambda b, s: hide(b, s, m, number)), MASKED)
    canonical(program)
    assert str(only_attention(program).args[3].meta["value"]) == "bool[batch, 1, 1, length]"


def added(b, s, m):
    m = b.reshape(b.cast(m, dtype="float32"), shape=(B, 1, 1, T))
    return b.add(s, b.mul(b.sub(1.0, m), LOWEST))


def test_an_added_mask_becomes_boolean_and_is_noted():
    program = program_of(lambda b, x, m: spelt_out(b, x, lambda b, s: added(b, s, m)), MASKED)
    notes = canonical(program)
    assert only_attention(program).args[3].meta["value"].dtype == "bool"
    assert any("rows that hide every key" in n for n in notes)


@pytest.mark.parametrize(
    "hidden",
    [
        lambda b, m: b.add(b.mul(m, 1e4), -1e4),
        lambda b, m: b.mul(b.sub(m, 1.0), 1e9),
        lambda b, m: b.mul(b.add(b.neg(m), 1.0), -1e4),
        lambda b, m: b.div(b.sub(1.0, m), -1e-9),
        lambda b, m: b.mul(b.cast(b.eq(b.cast(m, dtype="int64"), 0), dtype="float32"), -1e9),
    ],
)
def test_arithmetic_that_hides_keys(hidden):
    def model(b, x, m):
        m = b.reshape(b.cast(m, dtype="float32"), shape=(B, 1, 1, T))
        return spelt_out(b, x, lambda b, s: b.add(s, hidden(b, m)))

    program = program_of(model, MASKED)
    canonical(program)
    assert str(only_attention(program).args[3].meta["value"]) == "bool[batch, 1, 1, length]"


@pytest.mark.parametrize("number", [-5.0, 1e4])
def test_arithmetic_that_hides_nothing_stays_additive(number):
    def model(b, x, m):
        m = b.reshape(b.cast(m, dtype="float32"), shape=(B, 1, 1, T))
        return spelt_out(b, x, lambda b, s: b.add(s, b.mul(b.sub(1.0, m), number)))

    program = program_of(model, MASKED)
    canonical(program)
    assert only_attention(program).args[3].meta["value"].dtype == "float32"


def test_a_mask_of_fractions_stays_additive():
    inputs = {**X, "m": Value("float32", (B, T))}
    program = program_of(lambda b, x, m: spelt_out(b, x, lambda b, s: added(b, s, m)), inputs)
    canonicalize(program)
    assert only_attention(program).args[3].meta["value"].dtype == "float32"


def test_an_input_of_numbers_stays_an_additive_mask():
    inputs = {**X, "m": Value("float32", (B, 1, T, T))}
    program = program_of(lambda b, x, m: spelt_out(b, x, lambda b, s: b.add(s, m)), inputs)
    canonical(program)
    assert only_attention(program).args[3].meta["value"].dtype == "float32"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda b, s: b.where(b.gt(s, 0.0), s, -5.0), "does not hide"),
        (lambda b, s: b.mul(b.where(b.gt(s, 0.0), -1e9, s), 1e-3), "too small"),
        (
            lambda b, s: b.tanh(b.add(s, b.full(shape=(T, T), value=-1.0, dtype="float32"))),
            "before the soft cap",
        ),
        (lambda b, s: b.tanh(b.tanh(s)), "no soft cap"),
        (lambda b, s: b.sigmoid(s), "come from sigmoid"),
    ],
)
def test_other_scores_are_left_with_the_reason(change, reason):
    program = program_of(lambda b, x: spelt_out(b, x, change), X)
    report = rewritten(program, attention.RULES)
    assert "softmax" in names(program)
    assert any(reason in e.reason for e in report.skipped), report.skipped


@pytest.mark.parametrize("hidden", [False, True])
def test_a_tanh_between_scale_and_mask_is_a_soft_cap(hidden):
    def capped(b, s, m):
        s = b.mul(b.tanh(b.div(s, 3.0)), 3.0)
        return hide(b, s, m, LOWEST) if hidden else added(b, s, m)

    program = program_of(lambda b, x, m: spelt_out(b, x, lambda b, s: capped(b, s, m)), MASKED)
    canonical(program)
    node = only_attention(program)
    assert node.kwargs["softcap"] == 3.0 and node.kwargs["scale"] == pytest.approx(1.0)
    assert node.args[3].meta["value"].dtype == "bool"


def test_a_mask_that_is_scaled_with_the_scores():
    program = program_of(
        lambda b, x, m: spelt_out(b, x, lambda b, s: b.div(added(b, s, m), 4.0), scale=1.0), MASKED
    )
    canonical(program)
    node = only_attention(program)
    assert node.kwargs["scale"] == 0.5 and node.args[3].meta["value"].dtype == "bool"


def test_heads_joined_with_the_batch():
    """BLOOM's way: products over [B*H, T, D], a mask over [B, H, T, T], a bias over [B*H, 1, T]."""

    def model(b, x, bias, m):
        def joined(x):
            value = x.meta["value"].shape
            return b.reshape(x, shape=(B * 2, *value[2:]))

        q, k, v = (joined(heads(b, y)) for y in (x, b.mul(x, 2.0), b.neg(x)))
        scores = b.mul(b.matmul(q, b.permute(k, dims=(0, 2, 1))), 0.5)
        scores = b.add(scores, b.reshape(bias, shape=(B * 2, 1, T)))
        scores = added(b, b.reshape(scores, shape=(B, 2, T, T)), m)
        out = b.matmul(joined(b.softmax(scores, dim=-1)), v)
        return merged(b, b.reshape(out, shape=(B, 2, T, 4)))

    program = program_of(model, {**X, "bias": Value("float32", (B, 2, T)), "m": MASKED["m"]})
    canonical(program)
    assert only_attention(program).kwargs["heads"] == 2
    assert str(only_attention(program).args[3].meta["value"]) == "float32[batch, 2, 1, length]"


def test_a_softmax_over_queries_is_no_attention():
    def model(b, x):
        q = heads(b, x)
        return merged(b, b.matmul(b.softmax(b.matmul(q, b.permute(q, dims=(0, 1, 3, 2))), dim=2), q))

    program = program_of(model, X)
    canonical(program)
    assert "attention" not in names(program)


# -- shared key heads


def repeat(b, x, count):
    batch, groups, length, width = x.meta["value"].shape
    wide = b.expand(
        b.reshape(x, shape=(batch, groups, 1, length, width)), shape=(batch, groups, count, length, width)
    )
    return b.reshape(wide, shape=(batch, groups * count, length, width))


@pytest.mark.parametrize(("groups", "count"), [(2, 2), (1, 4)])
def test_repeated_keys_are_shared(groups, count):
    def model(b, x):
        k = heads(b, b.slice(x, dim=2, start=0, end=2 * groups), groups)
        k, v = repeat(b, k, count), repeat(b, b.neg(k), count)
        return b.attention(x, merged(b, k), merged(b, v), heads=4, kv_heads=4, scale=0.5)

    program = program_of(model, X)
    canonical(program)
    node = only_attention(program)
    assert (node.kwargs["heads"], node.kwargs["kv_heads"]) == (4, groups)
    assert "expand" not in names(program) and "permute" not in names(program)


def test_keys_that_are_rotated_after_the_repetition_are_shared():
    def model(b, x):
        angles = b.reshape(b.cast(b.arange(end=T), dtype="float32"), shape=(1, T, 1))
        angles = b.expand(angles, shape=(1, T, 2))
        k = b.slice(x, dim=2, start=0, end=4)
        turned = merged(b, repeat(b, heads(b, k, 2), 2))
        turned = b.rotary_embedding(turned, b.cos(angles), b.sin(angles), heads=4)
        v = merged(b, repeat(b, heads(b, b.neg(k), 2), 2))
        return b.attention(x, turned, v, heads=4, kv_heads=4, scale=0.5)

    program = program_of(model, X)
    canonical(program)
    assert only_attention(program).kwargs["kv_heads"] == 2 and "expand" not in names(program)
    assert program.main.calls("rotary_embedding")[0].kwargs["heads"] == 2


def test_one_head_of_keys_that_the_products_broadcast():
    def model(b, x):
        k = heads(b, b.slice(x, dim=2, start=0, end=2), 1)
        scores = b.mul(b.matmul(heads(b, x, 4), b.permute(k, dims=(0, 1, 3, 2))), 0.5)
        return merged(b, b.matmul(b.softmax(scores, dim=3), b.neg(k)))

    program = program_of(model, X)
    canonical(program)
    node = only_attention(program)
    assert (node.kwargs["heads"], node.kwargs["kv_heads"]) == (4, 1)


def test_keys_repeated_in_the_other_order_are_not_groups():
    """k0 k1 k0 k1 serves other query heads than k0 k0 k1 k1."""

    def model(b, x):
        k = b.reshape(b.slice(x, dim=2, start=0, end=4), shape=(B, T, 1, 4))
        k = b.reshape(b.expand(k, shape=(B, T, 2, 4)), shape=(B, T, 8))
        return b.attention(x, k, k, heads=4, kv_heads=4, scale=0.5)

    program = program_of(model, X)
    canonical(program)
    assert only_attention(program).kwargs["kv_heads"] == 4


# -- masks


def attend(b, x, mask, **attributes):
    return b.attention(x, b.neg(x), x, mask, heads=2, kv_heads=2, scale=0.5, **attributes)


def grid(b):
    return b.reshape(b.arange(end=T), shape=(1, 1, T, 1)), b.reshape(b.arange(end=T), shape=(1, 1, 1, T))


def test_a_conjunction_is_taken_apart():
    def model(b, x, m):
        rows, columns = grid(b)
        always = b.logical_and(b.full(shape=(), value=True, dtype="bool"), b.ge(rows, 0))
        causal = b.le(columns, rows)
        padding = b.reshape(b.cast(m, dtype="bool"), shape=(B, 1, 1, T))
        both = b.logical_and(b.logical_and(b.reshape(always, shape=(1, 1, T, 1)), causal), padding)
        return attend(b, x, b.expand(both, shape=(B, 1, T, T)))

    program = program_of(model, MASKED)
    canonical(program)
    node = only_attention(program)
    assert node.kwargs["causal"] and str(node.args[3].meta["value"]) == "bool[batch, 1, 1, length]"
    assert sorted(names(program)) == ["attention", "cast", "neg", "reshape"]


def test_an_expanded_mask_is_only_given_its_axes():
    def model(b, x, m):
        return attend(b, x, b.expand(b.cast(m, dtype="bool"), shape=(1, 1, 7, 7)))

    program = program_of(model, {"x": Value("float32", (1, 7, 8)), "m": Value("int64", (1, 7))}, {})
    canonical(program)
    assert str(only_attention(program).args[3].meta["value"]) == "bool[1, 1, 1, 7]"


def test_a_scale_that_went_through_float32_is_exact_again():
    def model(b, x):
        return b.attention(x, b.neg(x), x, heads=2, kv_heads=2, scale=0.50000003)

    program = program_of(model, X)
    canonical(program)
    assert only_attention(program).kwargs["scale"] == 0.5


@pytest.mark.parametrize("window", [1, 5])
def test_a_band_becomes_a_window(window):
    def model(b, x):
        rows, columns = grid(b)
        return attend(b, x, b.logical_and(b.le(columns, rows), b.gt(columns, b.sub(rows, window))))

    program = program_of(model, X)
    canonical(program)
    node = only_attention(program)
    assert (node.kwargs["causal"], node.kwargs["window"], node.args[3]) == (True, window, None)


def test_a_window_longer_than_the_longest_input_is_none():
    def model(b, x):
        rows, columns = grid(b)
        return attend(b, x, b.gt(columns, b.sub(rows, 40)))

    program = program_of(model, X)
    canonical(program)
    assert "window" not in only_attention(program).kwargs and names(program) == ["neg", "attention"]


def test_a_triangle_that_is_shifted_stays_a_mask():
    def model(b, x):
        rows, columns = grid(b)
        return attend(b, x, b.le(columns, b.add(rows, 1)))

    program = program_of(model, X)
    canonical(program)
    node = only_attention(program)
    assert not node.kwargs.get("causal") and node.args[3] is not None


@pytest.mark.parametrize("stored", ["boolean", "additive"])
def test_a_stored_triangle_is_causal(stored):
    def model(b, x):
        triangle = torch.ones(1, 1, 40, 40, dtype=torch.bool).tril()
        if stored == "additive":
            triangle = torch.zeros(1, 1, 40, 40).masked_fill(~triangle, float("-inf"))
        mask = b.slice(b.slice(b.parameter("seen", triangle), dim=2, start=0, end=T), dim=3, start=0, end=T)
        return attend(b, x, mask)

    program = program_of(model, X)
    canonical(program)
    node = only_attention(program)
    assert node.kwargs["causal"] and node.args[3] is None and not program.parameters


def test_a_causal_number_mask_made_on_the_spot():
    def model(b, x):
        rows, columns = grid(b)
        mask = b.where(
            b.gt(columns, rows), float("-inf"), b.full(shape=(1, 1, T, T), value=0.0, dtype="float32")
        )
        return attend(b, x, mask)

    program = program_of(model, X)
    canonical(program)
    assert only_attention(program).kwargs["causal"] and names(program) == ["neg", "attention"]


def test_a_learned_bias_is_no_mask():
    program = program_of(lambda b, x: attend(b, x, b.parameter("bias", torch.randn(1, 2, 1, 1))), X)
    report = apply_rules(program.main, masks.RULES)
    assert any("additive mask stays" in e.reason for e in report.skipped)
    assert only_attention(program).args[3].op == "get_attr"


def test_scaled_scores_with_masks_of_both_kinds():
    """What hides keys in one mask keeps its number, whatever the scores are multiplied by."""
    inputs = {
        **{n: Value("float32", (B, 2, T, 4)) for n in "qkv"},
        "m": Value("int64", (B, T)),
        "n": Value("float32", (B, T)),
    }

    def model(b, q, k, v, m, n):
        scores = b.mul(b.matmul(q, b.permute(k, dims=(0, 1, 3, 2))), 0.5)
        seen = b.reshape(b.cast(m, dtype="bool"), shape=(B, 1, 1, T))
        scores = b.add(b.where(seen, scores, LOWEST), b.reshape(n, shape=(B, 1, T, 1)))
        return b.matmul(b.softmax(scores, dim=-1), v)

    program = program_of(model, inputs)
    canonical(program)
    assert only_attention(program).args[3].args[2] == LOWEST


def test_trying_a_mask_leaves_nothing_behind():
    inputs = {
        "x": Value("float32", (B, 3, 8)),
        "m": Value("float32", (B, 1, 3, 3)),
        "n": Value("float32", (3, 3)),
    }
    program = program_of(lambda b, x, m, n: attend(b, x, b.add(m, n)), inputs)
    before = program.digest()
    apply_rules(program.main, masks.RULES)
    assert program.digest() == before


def test_numbers_beside_what_hides_stay_numbers():
    """ALiBi + causal + padding: the triangle is an attribute, and padding hides numbers that depend on no query."""

    def model(b, x, m):
        rows, columns = grid(b)
        slopes = b.parameter("slopes", torch.tensor([0.5, 0.25]).reshape(1, 2, 1, 1))
        seen = b.logical_and(b.le(columns, rows), b.reshape(b.cast(m, dtype="bool"), shape=(B, 1, 1, T)))
        return attend(b, x, b.add(b.mul(slopes, columns), b.where(seen, 0.0, LOWEST)))

    program = program_of(model, MASKED)
    notes = canonical(program)
    node = only_attention(program)
    assert node.kwargs["causal"] and str(node.args[3].meta["value"]) == "float32[batch, 2, 1, length]"
    assert node.args[3].target.name == "where" and node.args[3].args[2] == LOWEST
    assert any("rows that hide every key give the mean" in n for n in notes)
    once = program.digest()
    canonicalize(program)
    assert program.digest() == once


def test_a_mask_that_is_a_comparison_with_another():
    """where(mask < -1, lowest, numbers), as Falcon adds its ALiBi."""

    def model(b, x, m, bias):
        mask = b.where(b.reshape(b.cast(m, dtype="bool"), shape=(B, 1, 1, T)), 0.0, LOWEST)
        return attend(b, x, b.where(b.lt(mask, -1.0), LOWEST, bias))

    program = program_of(model, {**MASKED, "bias": Value("float32", (B, 2, 1, T))})
    canonical(program)
    assert sorted(names(program)) == ["attention", "cast", "neg", "reshape", "where"]


def test_a_stored_table_of_a_triangle_and_numbers():
    def model(b, x):
        table = torch.randn(1, 2, 40, 40).masked_fill(~torch.ones(40, 40, dtype=torch.bool).tril(), LOWEST)
        mask = b.slice(b.slice(b.parameter("bias", table), dim=2, start=0, end=T), dim=3, start=0, end=T)
        return attend(b, x, mask)

    program = program_of(model, X)
    canonical(program)
    node = only_attention(program)
    assert node.kwargs["causal"] and names(program) == ["neg", "slice", "slice", "attention"]
    assert str(node.args[3].meta["value"]) == "float32[1, 2, length, length]"


def test_canonical_form_is_a_fixed_point():
    def model(b, x, m):
        return spelt_out(b, x, lambda b, s: added(b, s, m))

    program = program_of(model, MASKED)
    canonicalize(program)
    once = program.digest()
    canonicalize(program)
    assert program.digest() == once
    assert torch.isfinite(run(program.main, sample(program))["y"]).all()
