"""Attention on codes."""

from __future__ import annotations

import pytest
import torch

from tersor.errors import PipelineError
from tersor.ir import Program
from tersor.passes import Context, Pipeline
from tersor.passes.numerics import outputs, relative_error, small_inputs
from tersor.passes.quantize.attention import IntegerAttention
from tersor.passes.quantize.bf16 import BFloat16
from tersor.passes.quantize.integers import IntegerProducts
from tersor.passes.recipes import get
from tests.passes.check_pass import check_pass
from tests.passes.programs import Transformer, Weights, program

WIDTH, HEADS, KV_HEADS = 16, 4, 2


def attention(
    *, scales: list[torch.Tensor] | None = None, integer: bool = False, rotated: bool = False
) -> Program:
    """One attention behind three linear layers, with what the passes make of it."""

    def emit(build, x, mask):
        weights = Weights(build)
        q, k, v = (
            weights.linear(x, site, heads * 4, WIDTH)
            for site, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS))
        )
        form = {"heads": HEADS, "kv_heads": KV_HEADS, "causal": True, "softcap": 20.0}
        if rotated:
            angles = build.parameter("angles", torch.zeros(1, 1, 4))
            length = (1, x.meta["value"].shape[1], 4)
            angles = build.expand(angles, shape=length)
            q = build.rotary_embedding(q, build.cos(angles), build.sin(angles), heads=HEADS)
        if scales is None:
            return {"y": build.emit("attention", q, k, v, mask, scale=0.5, site="attention", **form)}
        stored = [build.parameter(f"s{i}", s.repeat_interleave(4)) for i, s in enumerate(scales)]
        codes = [
            build.quantize(operand, s, 128, dtype="uint8", axis=2)
            for operand, s in zip((q, k, v), stored, strict=True)
        ]
        if integer:
            score = build.parameter("score", scales[0] * scales[1].repeat_interleave(2) * 0.5)
            value = build.parameter("value", scales[2])
            made = build.emit("integer_attention", *codes, score, value, mask, site="attention", **form)
            return {"y": made}
        q, k, v = (build.dequantize(c, s, 128, axis=2) for c, s in zip(codes, stored, strict=True))
        form |= {"scale": 0.5, "products": "uint8"}
        return {"y": build.emit("attention", q, k, v, mask, site="attention", **form)}

    return program(emit, mask="padding")


SCALES = [torch.tensor([0.01, 0.02, 0.03, 0.04]), torch.tensor([0.02, 0.03]), torch.tensor([0.025, 0.015])]


def data(spread: float = 0.0) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(2, 20, WIDTH, generator=generator) for _ in range(6)]
    for x in batches:
        x[:, ::10] *= 1 + spread
    return [{"x": x, "mask": torch.ones(2, 1, 1, 20, dtype=torch.bool)} for x in batches]


def run_on(made: Program, limit: float | None = None, spread: float = 0.0):
    return Pipeline([IntegerAttention(largest_error=limit)]).run(made, calibration=data(spread))


def distance(a: Program, b: Program) -> float:
    inputs = small_inputs(a, seed=3)
    return relative_error(outputs(a, inputs), outputs(b, inputs))


def test_an_attention_gets_a_scale_for_each_head():
    check_pass(IntegerAttention(), attention(), None, unmatched=attention(rotated=True), calibration=data())
    made = attention()
    after, report = run_on(made, limit=1e-2)
    (change,) = report.steps[0].changes
    assert change.site == "attention" and 0 < change.figures["output_error"] < 1e-3
    assert distance(made, after) < 0.03
    coded = after.main.calls("quantize")
    scales = [after.main.parameter(node.args[1]).reshape(-1, 4) for node in coded]
    assert [len(s) for s in scales] == [HEADS, KV_HEADS, KV_HEADS]
    assert all((s == s[:, :1]).all() and len({*s[:, 0].tolist()}) == len(s) for s in scales)


def test_an_attention_that_loses_too_much_is_left_alone():
    after, report = run_on(attention(), limit=1e-4, spread=1e3)
    (skip,) = report.steps[0].skips
    assert not after.main.calls("quantize") and skip.figures["output_error"] > 1e-4


def test_what_is_not_for_codes_is_said():
    (skip,) = run_on(attention(rotated=True))[1].steps[0].skips
    assert "query is no result of a linear layer" in skip.reason
    (skip,) = run_on(attention(scales=SCALES))[1].steps[0].skips
    assert "already" in skip.reason
    with pytest.raises(PipelineError):
        IntegerAttention(largest_error=0.0)


def test_bf16_leaves_codes_alone():
    made = attention(scales=SCALES)
    after, report = Pipeline([BFloat16(kinds=("attention",))]).run(made)
    assert after is made and "uint8 already" in report.steps[0].skips[-1].reason


def test_decoded_attention_becomes_integer_products():
    coded = attention(scales=SCALES)
    after = check_pass(
        IntegerProducts(), coded, attention(scales=SCALES, integer=True), unmatched=attention()
    )
    # a weight between two codes may become either
    assert distance(coded, after) < 5e-3


def test_heads_with_several_scales_stay_decoded():
    made = attention(scales=SCALES)
    name = made.main.calls("quantize")[0].args[1].target
    made.parameters[name].tensor[0] *= 2
    after, report = Pipeline([IntegerProducts()]).run(made)
    assert not after.main.calls("integer_attention")
    assert "one stored scale per head" in report.steps[0].skips[-1].reason
    made = attention(scales=SCALES)
    (node,) = made.main.calls("attention")
    node.kwargs = node.kwargs | {"scale": -0.5}
    _, report = Pipeline([IntegerProducts()]).run(made)
    assert "positive" in report.steps[0].skips[-1].reason


def test_the_recipe_puts_attention_into_integers():
    made = Transformer(mask="padding").build()
    generator = torch.Generator().manual_seed(0)
    batches = [
        {"x": torch.randn(2, 20, 16, generator=generator), "mask": torch.ones(2, 1, 1, 20, dtype=torch.bool)}
        for _ in range(6)
    ]
    after, _ = get("int8").run(made, Context(), calibration=batches)
    assert len(after.main.calls("integer_attention")) == 2 and not after.main.calls("attention")
