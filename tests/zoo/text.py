"""Encoders of text, and the encoder-decoders of text."""

from __future__ import annotations

import torch
import transformers

from tests.zoo.model import (
    BATCH,
    DEEPER,
    LENGTH,
    SMALL,
    VOCABULARY,
    Inputs,
    ZooModel,
    seeded,
    text,
    text_model,
)

POSITIONS = {"vocab_size": VOCABULARY, "max_position_embeddings": 40}
TARGET = ("target_length", 1, 24)


def _bert():
    return transformers.BertModel(transformers.BertConfig(**DEEPER, **POSITIONS))


def _roberta():
    return transformers.RobertaModel(transformers.RobertaConfig(**SMALL, **POSITIONS))


def _distilbert():
    config = transformers.DistilBertConfig(dim=64, n_layers=1, n_heads=4, hidden_dim=96, **POSITIONS)
    return transformers.DistilBertModel(config)


def _albert():
    return transformers.AlbertModel(transformers.AlbertConfig(embedding_size=32, **DEEPER, **POSITIONS))


def _electra():
    return transformers.ElectraModel(transformers.ElectraConfig(embedding_size=32, **SMALL, **POSITIONS))


def _mpnet():
    return transformers.MPNetModel(transformers.MPNetConfig(**DEEPER, **POSITIONS))


def _deberta_v2():
    # The options of the published checkpoints (microsoft/deberta-v3-base).
    config = transformers.DebertaV2Config(
        relative_attention=True, position_buckets=8, norm_rel_ebd="layer_norm", share_att_key=True,
        pos_att_type=["p2c", "c2p"], position_biased_input=False, type_vocab_size=0, **DEEPER, **POSITIONS,
    )  # fmt: skip
    return transformers.DebertaV2Model(config)


def _t5() -> transformers.T5Config:
    # torch's ONNX exporter cannot lay out what its own attention gives here, so the file is exported without it.
    return transformers.T5Config(
        vocab_size=VOCABULARY, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4,
        relative_attention_num_buckets=8, relative_attention_max_distance=16, attn_implementation="eager",
    )  # fmt: skip


def _t5_decoder():
    return transformers.T5Model(_t5()).get_decoder()


def _bart():
    config = transformers.BartConfig(
        d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=96, decoder_ffn_dim=96, **POSITIONS,
    )  # fmt: skip
    return transformers.BartModel(config)


def _step(batch: int, length: int, target_length: int) -> Inputs:
    """Ids of the text so far, and what an encoder made of the other text."""
    states = torch.randn(batch, length, 64, generator=seeded(batch))
    return {
        "input_ids": text(batch, target_length)["input_ids"],
        "encoder_hidden_states": states,
        "encoder_attention_mask": text(batch, length)["attention_mask"],
    }


def _two_texts(batch: int, length: int, target_length: int) -> Inputs:
    decoder = text(batch, target_length, prefix="decoder_")
    return {**text(batch, length), **decoder}


TWO_LENGTHS = (
    {"batch": 2, "length": 12, "target_length": 7},
    {"batch": 3, "length": 5, "target_length": 21},
    {"batch": 1, "length": 24, "target_length": 3},
)
SOURCE_AXES, TARGET_AXES = {0: BATCH, 1: LENGTH}, {0: BATCH, 1: TARGET}

MODELS = (
    text_model("BERT", "text", _bert),
    text_model("RoBERTa", "text", _roberta),
    text_model("DistilBERT", "text", _distilbert),
    text_model("ALBERT", "text", _albert),
    text_model("ELECTRA", "text", _electra),
    text_model("MPNet", "text", _mpnet),
    text_model("DeBERTa-v2", "text", _deberta_v2),
    text_model("T5 encoder", "text", lambda: transformers.T5EncoderModel(_t5())),
    ZooModel(
        "T5 decoder step",
        "text",
        _t5_decoder,
        _step,
        TWO_LENGTHS,
        {
            "input_ids": TARGET_AXES,
            "encoder_hidden_states": SOURCE_AXES,
            "encoder_attention_mask": SOURCE_AXES,
        },
    ),
    ZooModel(
        "BART",
        "text",
        _bart,
        _two_texts,
        TWO_LENGTHS,
        {
            "input_ids": SOURCE_AXES,
            "attention_mask": SOURCE_AXES,
            "decoder_input_ids": TARGET_AXES,
            "decoder_attention_mask": TARGET_AXES,
        },
    ),
)
