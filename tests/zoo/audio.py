"""Models of sound."""

from __future__ import annotations

import torch
import transformers

from tests.zoo.model import BATCH, Inputs, ZooModel, seeded


def _whisper() -> transformers.WhisperConfig:
    return transformers.WhisperConfig(
        d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=96, decoder_ffn_dim=96, max_source_positions=20, max_target_positions=40, num_mel_bins=8,
        vocab_size=60, pad_token_id=1, bos_token_id=2, eos_token_id=3, decoder_start_token_id=2,
    )  # fmt: skip


def _mel(batch: int) -> Inputs:
    return {"input_features": torch.randn(batch, 8, 40, generator=seeded(batch))}


MODELS = (
    ZooModel(
        "Whisper encoder",
        "audio",
        lambda: transformers.WhisperModel(_whisper()).get_encoder(),
        _mel,
        ({"batch": 2}, {"batch": 3}, {"batch": 1}),
        {"input_features": {0: BATCH}},
    ),
)
