"""Every architecture of the bars: right against torch, and in canonical form, static and dynamic alike."""

from __future__ import annotations

import models
import pytest
import torch

from tersor import frontends
from tersor.frontends import torch_export
from tersor.frontends.transformers import load
from tersor.ir import verify

TOLERANCE = 1e-5
SIZES = [(1, 1), (1, 7), (3, 12), (2, 33), (5, models.LONGEST)]

# Operations for two layers; a dynamic program has slices of tables besides.
BLOCKS = {"attention": 2, "add": 5, "layer_norm": 5}
CANONICAL = {
    "bert": {**BLOCKS, "add": 6, "embedding": 1, "linear": 13, "gelu": 2, "tanh": 1, "cast": 1, "reshape": 2},
    "distilbert": {**BLOCKS, "embedding": 1, "linear": 12, "gelu": 2, "cast": 1, "reshape": 1},
    "gpt2": {**BLOCKS, "embedding": 1, "linear": 13, "gelu_tanh": 2, "cast": 1, "reshape": 1},
    "llama": {
        "embedding": 1, "rms_norm": 5, "linear": 15, "rotary_embedding": 4, "attention": 2, "silu": 2, "mul": 2,
        "add": 4, "cast": 1, "reshape": 1,
    },
    "post_norm": {
        "embedding": 1, "linear": 12, "attention": 2, "add": 4, "layer_norm": 4, "gelu": 2, "ne": 1, "reshape": 1,
    },
    "spelt_out": {
        "embedding": 1, "layer_norm": 1, "linear": 5, "rotary_embedding": 2, "attention": 1, "add": 2, "rms_norm": 1,
        "gelu": 1, "ne": 1, "reshape": 1,
    },
    "vit": {
        **BLOCKS, "conv2d": 1, "concat": 1, "expand": 1, "permute": 1, "reshape": 2, "linear": 13, "gelu": 2, "tanh": 1,
    },
    "whisper_encoder": {**BLOCKS, "conv1d": 2, "gelu": 4, "linear": 12, "permute": 1},
}  # fmt: skip
CANONICAL["post_norm_time_first"] = CANONICAL["post_norm"]


def without_slices(program):
    counts = models.operations(program)
    del counts["slice"]
    return dict(counts)


@pytest.fixture(scope="module", params=sorted(models.TEXT))
def text_model(request):
    torch.manual_seed(0)
    return request.param, models.prepared(models.TEXT[request.param]())


def test_text_models_are_right_at_every_size_and_canonical(text_model):
    name, model = text_model
    program = frontends.capture(model, models.text(), models.text_dims())
    verify(program)
    for batch, length in SIZES:
        assert models.error(program, model, models.text(batch, length)) <= TOLERANCE, (batch, length)
    static = frontends.capture(model, models.text())
    assert models.error(static, model, models.text()) <= TOLERANCE
    assert without_slices(static) == without_slices(program)
    if name in CANONICAL:
        assert without_slices(program) == CANONICAL[name]


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_attention_that_is_spelt_out_gives_the_same_program(name):
    programs = []
    for implementation in ("sdpa", "eager"):
        torch.manual_seed(0)
        model = models.prepared(models.TEXT[name](attn_implementation=implementation))
        # transformers.capture would switch to torch's own attention
        programs.append(torch_export.capture(model, {**models.text(), **models.no_cache(model)}))
        assert models.error(programs[-1], model, models.text()) <= TOLERANCE
    assert models.operations(programs[0]) == models.operations(programs[1])
    attributes = [[n.kwargs for n in p.main.calls("attention")] for p in programs]
    assert attributes[0] == attributes[1]


@pytest.mark.parametrize("name", sorted(models.OTHER))
def test_other_models_are_right_and_canonical(name):
    torch.manual_seed(0)
    make, inputs = models.OTHER[name]
    model = models.prepared(make())
    (key,) = inputs(1)
    program = frontends.capture(model, inputs(2), {key: {0: ("batch", 1, 8)}})
    for batch in (1, 2, 5):
        assert models.error(program, model, inputs(batch)) <= TOLERANCE
    assert without_slices(program) == CANONICAL[name]


def test_grouped_heads_causal_masks_and_scales_are_attributes():
    torch.manual_seed(0)
    program = frontends.capture(models.prepared(models.TEXT["llama"]()), models.text(), models.text_dims())
    for node in program.main.calls("attention"):
        assert (node.kwargs["heads"], node.kwargs["kv_heads"], node.kwargs["causal"]) == (4, 2, True)
        assert node.kwargs["scale"] == pytest.approx(8**-0.5)
        mask = node.args[3].meta["value"]
        assert str(mask) == "bool[batch, 1, 1, length]"


def test_the_trained_minilm(minilm_folder):
    program = frontends.capture(minilm_folder, dynamic="auto")
    model = load(minilm_folder)
    for batch, length in [(1, 1), (3, 17), (2, 200)]:
        assert models.error(program, model, models.text(batch, length, vocab=30000)) <= TOLERANCE
    assert program.main.dims["length"].max == 512
