"""Perplexity of SmolLM2-135M on a text (WikiText-2 raw, test), in windows that share nothing.

Each window is one call; its first token is given and the others are predicted. The first row is torch, in float32. The
output projection shares its weight with the embedding and stays wide.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

import tersor
from benchmarks.accuracy.smollm2 import load
from benchmarks.accuracy.variants import names, pipeline
from benchmarks.record import Record

Logits = Callable[[np.ndarray], np.ndarray]
RECIPES = "int8-dynamic,int8-dynamic-unsmoothed,int8,int8-unsmoothed"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument("--data", type=Path, required=True, help="the text")
    parser.add_argument("--recipe", type=names, default=RECIPES.split(","), help=f"default: {RECIPES}")
    parser.add_argument("--context", type=int, default=1024, help="tokens in a window")
    parser.add_argument("--tokens", type=int, default=16 * 1024, help="of the text, from its beginning")
    parser.add_argument("--samples", type=int, default=16, help="windows of the calibration text")


def execute(options: argparse.Namespace) -> None:
    """Prints each perplexity and its ratio to that in float32."""
    model, tokenizer = load()
    text = windows(tokenizer, options.data, options.context)[: options.tokens // options.context]
    calibration = None
    if options.calibration:
        found = windows(tokenizer, options.calibration, options.context)
        calibration = [{"input_ids": ids} for ids in spread(found, options.samples)]
    record = Record(
        "Perplexity of SmolLM2-135M",
        options.command,
        ("tersor", "torch", "transformers"),
        f"{len(text)} windows of {options.context} tokens: {len(text) * (options.context - 1)} predictions; "
        f"calibrated with {len(calibration or ())} windows of another text.",
        ("engine", "recipe", "perplexity", "ratio to torch f32"),
    )
    expected = perplexity(torch_logits(model), text)
    record.add("torch", "f32", f"{expected:.3f}", "1")
    program = tersor.capture(model, {"input_ids": text[0]})
    for name in options.recipe:
        compiled = tersor.compile(
            program,
            recipe=pipeline(name),
            calibration=calibration,
            verify=False,  # of random text; here the real one is compared
        )
        found = perplexity(lambda ids, call=compiled: call(input_ids=ids)["logits"], text)
        record.add("tersor", name, f"{found:.3f}", f"{found / expected:.4f}")
    record.write(options.output, "smollm2")


def windows(tokenizer: Callable, file: Path, context: int) -> list[np.ndarray]:
    """Token ids [1, context] from the beginning of a text, as many as it fills."""
    ids = tokenizer(file.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    return [np.array([ids[at : at + context]]) for at in range(0, len(ids) - context + 1, context)]


def spread(items: list, count: int) -> list:
    """At most ``count`` of them, evenly spread."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def perplexity(logits: Logits, text: list[np.ndarray]) -> float:
    """exp of the mean negative log-likelihood of each window's tokens from its second one on."""
    total = count = 0.0
    for ids in text:
        scores = logits(ids)[0, :-1].astype(np.float64)
        following = ids[0, 1:]
        scores -= scores.max(1, keepdims=True)
        total -= (scores[np.arange(len(following)), following] - np.log(np.exp(scores).sum(1))).sum()
        count += len(following)
    return math.exp(total / count)


def torch_logits(model: Callable) -> Logits:
    """The model in torch, from token ids to logits as arrays."""
    import torch

    def call(ids: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return model(input_ids=torch.from_numpy(ids)).logits.numpy()

    return call
