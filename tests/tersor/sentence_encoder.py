"""A sentence encoder like all-MiniLM-L6-v2 as a folder, with random weights and a tokenizer for a few words."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

SENTENCES = (
    "The ferry to the island leaves every morning.",
    "A boat sails to the island daily.",
)
"""Of different lengths, so that one of them is padded."""

WIDTH = 384


def save(folder: Path):
    """Writes the folder, and returns the model."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel

    words = sorted(set(" ".join(SENTENCES).lower().replace(".", " .").split()))
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])}
    torch.manual_seed(0)
    sizes = dict(hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=6, intermediate_size=128)
    config = BertConfig(**sizes, vocab_size=len(vocabulary), max_position_embeddings=64)
    model = BertModel(config).eval()
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.enable_padding(length=24)  # as the file of all-MiniLM-L6-v2 asks for
    tokenizer.save(str(folder / "tokenizer.json"))
    return model


def ids(folder: Path, sentence: str) -> list[int]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    return tokenizer.encode(sentence).ids


def cosine(model, first: list[int], second: list[int]) -> float:
    """The cosine of two sentences' embeddings by torch, each without padding."""
    embeddings = []
    for tokens in (first, second):
        given = torch.tensor([tokens])
        with torch.no_grad():
            hidden = model(given, torch.ones_like(given)).last_hidden_state[0].double().mean(0)
        embeddings.append((hidden / hidden.norm()).numpy())
    return float(np.dot(*embeddings))
