"""Accuracy on real data: Spearman correlation of MiniLM's sentence similarities with people's (STS-B test).

The model is the trained all-MiniLM-L6-v2 of the ``demo`` extra; the data is a CSV file of sentence, sentence, score
(Cer et al. 2017), which the repository does not hold. Printed beside the figure of the same model in torch.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import tersor
from tersor.cli.demo import embed, encode, load_tokenizer, model_folder

BATCH, LENGTH = 8, 256
"""Sentences a call, and the most tokens a sentence keeps."""

Model = Callable[..., Any]


def main() -> None:
    """Print both correlations and the mean cosine between the two models' embeddings."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stsb", description=__doc__)
    parser.add_argument("data", type=Path, help="CSV file: sentence, sentence, score from 0 to 5")
    parser.add_argument("--recipe", default="fp32")
    options = parser.parse_args()
    with options.data.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    scores = np.array([float(row[2]) for row in rows])
    sentences = [row[0] for row in rows] + [row[1] for row in rows]
    axes = {0: ("batch", 1, BATCH), 1: ("length", 1, LENGTH)}
    compiled = tersor.compile(
        model_folder(), recipe=options.recipe, dynamic={"input_ids": axes, "attention_mask": axes}
    )
    tokenizer = load_tokenizer()
    tokenizer.enable_truncation(LENGTH)
    ours, theirs = (embeddings(model, tokenizer, sentences) for model in (compiled, torch_model()))
    for name, vectors in (("tersor", ours), ("torch", theirs)):
        first, second = np.split(vectors, 2)
        print(f"{name:8} Spearman {spearman((first * second).sum(1), scores):.4f} over {len(rows)} pairs")
    print(f"mean cosine of tersor's embeddings to torch's: {(ours * theirs).sum(1).mean():.7f}")


def torch_model() -> Model:
    """The same weights in torch, called like a compiled model."""
    import torch
    from transformers import AutoModel

    model = AutoModel.from_pretrained(model_folder()).eval()

    def call(**inputs: np.ndarray) -> dict[str, np.ndarray]:
        with torch.inference_mode():
            hidden = model(**{k: torch.from_numpy(v) for k, v in inputs.items()}).last_hidden_state
        return {"last_hidden_state": hidden.numpy()}

    return call


def embeddings(model: Model, tokenizer: Any, sentences: Sequence[str]) -> np.ndarray:
    """Unit vectors [sentences, width]; sentences of similar length share a batch."""
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
    vectors: dict[int, np.ndarray] = {}
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        inputs = encode(tokenizer, [sentences[i] for i in chosen])
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        hidden = model(**inputs)["last_hidden_state"]
        vectors.update(zip(chosen, embed(hidden, inputs["attention_mask"]), strict=True))
    return np.stack([vectors[i] for i in range(len(sentences))])


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation, equal values sharing their mean rank."""
    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values get the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


if __name__ == "__main__":
    main()
