"""Language models that decode from left to right; without a cache, over the whole text."""

from __future__ import annotations

from typing import Any

import transformers
from torch import nn

from tests.zoo.model import DEEPER, SMALL, VOCABULARY, ZooModel, text_model

LONGEST = 64
"""Positions that the models have; their texts are shorter."""

_TOKENS = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
_SHAPE = {"n_embd": 64, "n_layer": 1, "n_head": 4, "n_positions": LONGEST}
_GROUPED = {**SMALL, "num_key_value_heads": 2, "max_position_embeddings": LONGEST}
_HEADED = {k: v for k, v in SMALL.items() if k != "intermediate_size"}


def _decoder(name: str, architecture: str, config: str, **options: Any) -> ZooModel:
    """A causal language model of transformers by the names of its classes."""

    def make() -> nn.Module:
        return getattr(transformers, architecture)(getattr(transformers, config)(**_TOKENS, **options))

    return text_model(name, "decoders", make)


def _like_llama(name: str, family: str, **options: Any) -> ZooModel:
    """A model whose configuration has Llama's fields: grouped key heads, gated feed-forward layers."""
    return _decoder(name, f"{family}ForCausalLM", f"{family}Config", **{**_GROUPED, **options})


MODELS = (
    _decoder("GPT-2", "GPT2LMHeadModel", "GPT2Config", **_SHAPE),
    _decoder("GPT-Neo", "GPTNeoForCausalLM", "GPTNeoConfig", hidden_size=64, num_layers=2, num_heads=4,
             attention_types=[[["global", "local"], 1]], window_size=8, max_position_embeddings=LONGEST),
    _decoder("GPT-J", "GPTJForCausalLM", "GPTJConfig", **_SHAPE, rotary_dim=8),
    _decoder("CodeGen", "CodeGenForCausalLM", "CodeGenConfig", **_SHAPE, n_ctx=LONGEST, rotary_dim=8),
    _decoder("GPT-NeoX", "GPTNeoXForCausalLM", "GPTNeoXConfig", **SMALL, max_position_embeddings=LONGEST),
    _decoder("OPT", "OPTForCausalLM", "OPTConfig", **_HEADED, ffn_dim=96, word_embed_proj_dim=64,
             max_position_embeddings=LONGEST),
    _decoder("BLOOM", "BloomForCausalLM", "BloomConfig", hidden_size=64, n_layer=2, n_head=4),
    _decoder("Falcon", "FalconForCausalLM", "FalconConfig", **_HEADED),
    _decoder("Falcon, grouped", "FalconForCausalLM", "FalconConfig", **_HEADED, num_kv_heads=2,
             new_decoder_architecture=True),
    _like_llama("Llama", "Llama", **DEEPER),
    _like_llama("Mistral", "Mistral", sliding_window=8),
    _like_llama("Qwen2", "Qwen2"),
    _like_llama("Qwen3", "Qwen3", head_dim=16),
    _like_llama("Phi", "Phi", partial_rotary_factor=0.5),
    _like_llama("Phi-3", "Phi3"),
    _like_llama("Gemma", "Gemma", num_key_value_heads=1, head_dim=16),
    _like_llama("Gemma 2", "Gemma2", **DEEPER, head_dim=16, sliding_window=8, query_pre_attn_scalar=24),
    _like_llama("StableLM", "StableLm", partial_rotary_factor=0.25, use_qkv_bias=True),
    _like_llama("OLMo 2", "Olmo2"),
    _like_llama("Cohere", "Cohere", use_qk_norm=True),
    _like_llama("Granite", "Granite", embedding_multiplier=3.0, logits_scaling=2.0, residual_multiplier=0.5,
                attention_multiplier=0.3),
)  # fmt: skip
