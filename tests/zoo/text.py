"""Encoders of text."""

from __future__ import annotations

import transformers

from tests.zoo.model import SMALL, VOCABULARY, text_model

POSITIONS = {"vocab_size": VOCABULARY, "max_position_embeddings": 40}


def _bert():
    return transformers.BertModel(transformers.BertConfig(**SMALL, **POSITIONS))


def _roberta():
    return transformers.RobertaModel(transformers.RobertaConfig(**SMALL, **POSITIONS))


def _distilbert():
    config = transformers.DistilBertConfig(dim=64, n_layers=2, n_heads=4, hidden_dim=96, **POSITIONS)
    return transformers.DistilBertModel(config)


def _electra():
    return transformers.ElectraModel(transformers.ElectraConfig(embedding_size=32, **SMALL, **POSITIONS))


MODELS = (
    text_model("BERT", "text", _bert),
    text_model("RoBERTa", "text", _roberta),
    text_model("DistilBERT", "text", _distilbert),
    text_model("ELECTRA", "text", _electra),
)
