"""Models of sound."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

from tests.zoo.model import BATCH, LENGTH, SMALL, Inputs, ZooModel, seeded


def _whisper() -> transformers.WhisperConfig:
    return transformers.WhisperConfig(
        d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=96, decoder_ffn_dim=96, max_source_positions=20, max_target_positions=40, num_mel_bins=8,
        vocab_size=60, pad_token_id=1, bos_token_id=2, eos_token_id=3, decoder_start_token_id=2,
    )  # fmt: skip


class WhisperStep(nn.Module):
    """One step of the decoder: ids so far and the encoder's states in, logits out."""

    def __init__(self) -> None:
        super().__init__()
        whole = transformers.WhisperForConditionalGeneration(_whisper())
        self.decoder, self.head = whole.get_decoder(), whole.proj_out

    def forward(self, decoder_input_ids: torch.Tensor, encoder_hidden_states: torch.Tensor) -> torch.Tensor:
        result = self.decoder(decoder_input_ids, encoder_hidden_states=encoder_hidden_states, use_cache=False)
        return self.head(result.last_hidden_state)


def _wav2vec2(**options: Any) -> nn.Module:
    config = transformers.Wav2Vec2Config(
        **SMALL, vocab_size=32, conv_dim=(32, 32, 32), conv_stride=(5, 2, 2), conv_kernel=(10, 3, 2),
        num_feat_extract_layers=3, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4, **options,
    )  # fmt: skip
    return transformers.Wav2Vec2Model(config)


def _wave(batch: int) -> Inputs:
    return {"input_values": torch.randn(batch, 1200, generator=seeded(batch))}


def _mel(batch: int) -> Inputs:
    return {"input_features": torch.randn(batch, 8, 40, generator=seeded(batch))}


def _step(batch: int, length: int) -> Inputs:
    ids = torch.randint(4, 60, (batch, length), generator=seeded(length))
    return {
        "decoder_input_ids": ids,
        "encoder_hidden_states": torch.randn(batch, 20, 64, generator=seeded(batch)),
    }


BATCHES = ({"batch": 2}, {"batch": 3}, {"batch": 1})
MODELS = (
    ZooModel(
        "Whisper encoder",
        "audio",
        lambda: transformers.WhisperModel(_whisper()).get_encoder(),
        _mel,
        BATCHES,
        {"input_features": {0: BATCH}},
    ),
    ZooModel(
        "Whisper decoder",
        "audio",
        WhisperStep,
        _step,
        ({"batch": 2, "length": 7}, {"batch": 3, "length": 12}, {"batch": 1, "length": 3}),
        {"decoder_input_ids": {0: BATCH, 1: LENGTH}, "encoder_hidden_states": {0: BATCH}},
    ),
    ZooModel("wav2vec2", "audio", _wav2vec2, _wave, BATCHES, {"input_values": {0: BATCH}}),
    ZooModel(
        "wav2vec2 large",
        "audio",
        lambda: _wav2vec2(feat_extract_norm="layer", do_stable_layer_norm=True),
        _wave,
        BATCHES,
        {"input_values": {0: BATCH}},
    ),
)
