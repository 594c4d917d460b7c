"""Language models that decode from left to right; without a cache, over the whole text."""

from __future__ import annotations

import transformers

from tests.zoo.model import SMALL, VOCABULARY, text_model


def _gpt2():
    config = transformers.GPT2Config(
        n_embd=64, n_layer=2, n_head=4, n_positions=40, vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def _llama():
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, num_key_value_heads=2, max_position_embeddings=64, **SMALL
    )
    return transformers.LlamaForCausalLM(config)


MODELS = (
    text_model("GPT-2", "decoders", _gpt2),
    text_model("Llama", "decoders", _llama),
)
