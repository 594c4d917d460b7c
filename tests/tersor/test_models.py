"""Whole models, small and with random weights, captured and compiled with named dimensions, against torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import tersor

transformers = pytest.importorskip("transformers")

SIZES = dict(
    hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, vocab_size=100
)
TOLERANCE = 1e-4
"""Largest error relative to the output's scale: the project's bar for f32."""


def text(batch: int, length: int) -> dict[str, torch.Tensor]:
    """Ids with a padding mask of a different length in each row."""
    ids = torch.randint(2, 99, (batch, length))
    lengths = torch.randint(1, length + 1, (batch, 1))
    return {"input_ids": ids, "attention_mask": (torch.arange(length) < lengths).long()}


def bert():
    return transformers.BertModel(transformers.BertConfig(**SIZES))


def roberta():
    return transformers.RobertaModel(transformers.RobertaConfig(**SIZES, max_position_embeddings=66))


def distilbert():
    config = dict(dim=64, n_layers=2, n_heads=4, hidden_dim=128, vocab_size=100)
    return transformers.DistilBertModel(transformers.DistilBertConfig(**config))


def gpt2():
    ends = dict(bos_token_id=1, eos_token_id=1)
    config = transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=100, **ends)
    return transformers.GPT2LMHeadModel(config)


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, num_key_value_heads=2))


def vit():
    sizes = {k: v for k, v in SIZES.items() if k != "vocab_size"}
    return transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=32, patch_size=8))


def whisper_encoder():
    config = transformers.WhisperConfig(
        d_model=64,
        encoder_layers=2,
        encoder_attention_heads=4,
        encoder_ffn_dim=128,
        num_mel_bins=16,
        max_source_positions=50,
    )
    return transformers.models.whisper.modeling_whisper.WhisperEncoder(config)


def post_norm_encoder():
    layer = torch.nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    return torch.nn.TransformerEncoder(layer, 2)


BATCH, LENGTH = ("batch", 1, 4), ("length", 1, 64)
TEXT_DIMS = {"input_ids": {0: BATCH, 1: LENGTH}, "attention_mask": {0: BATCH, 1: LENGTH}}

MODELS: dict[Callable, tuple[Callable[[int, int], dict[str, torch.Tensor]], dict]] = {
    **dict.fromkeys((bert, roberta, distilbert, gpt2, llama), (text, TEXT_DIMS)),
    vit: (lambda batch, _: {"pixel_values": torch.randn(batch, 3, 32, 32)}, {"pixel_values": {0: BATCH}}),
    whisper_encoder: (
        lambda batch, _: {"input_features": torch.randn(batch, 16, 100)},
        {"input_features": {0: BATCH}},
    ),
    post_norm_encoder: (
        lambda batch, length: {"src": torch.randn(batch, length, 64)},
        {"src": {0: BATCH, 1: LENGTH}},
    ),
}


@pytest.mark.parametrize("make", MODELS, ids=lambda f: f.__name__)
def test_model(make):
    torch.manual_seed(0)
    model, (inputs, dims) = make().eval(), MODELS[make]
    compiled = tersor.compile(model, inputs(2, 16), dynamic=dims, threads=1)
    for batch, length in ((1, 1), (2, 16), (3, 37), (4, 64)):
        given = inputs(batch, length)
        with torch.no_grad():
            expected = model(**given)
        actual = compiled(**given)
        named = expected.items() if hasattr(expected, "items") else [(next(iter(actual)), expected)]
        compared = 0
        for name, value in named:
            if isinstance(value, torch.Tensor):
                error = (actual[name] - value).abs().max() / value.abs().max()
                assert error <= TOLERANCE, f"{name} at batch {batch}, length {length}: {error:.1e}"
                compared += 1
        assert compared
