"""Decoding token by token over a cache of keys and values: a Llama-style decoder, beside torch eager over its own.

The caches have room for 512 positions; a prefill of 128 tokens and the steps before fill the first ones. Both run in
this process, bound to one CPU, step by step in turns.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch

import tersor
from benchmarks.models import MODELS
from tersor.frontends.static_cache import WithStaticCache

ROOM, PROMPT = 512, 128


def main() -> None:
    """Print the times of a prefill and of a step, and how far the logits are from torch's."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--steps", type=int, default=100, help="tokens to decode (at most 384)")
    options = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    torch.set_num_threads(1)
    model = MODELS["llama-135m"].build()
    if options.layers:
        model.model.layers = model.model.layers[: options.layers]
        model.config.num_hidden_layers = options.layers
    ids = torch.randint(0, model.config.vocab_size, (1, PROMPT + min(options.steps, ROOM - PROMPT)))
    start, cached = torch.tensor(0), WithStaticCache(model, ROOM)
    program = tersor.capture(cached, {"input_ids": ids[:, :PROMPT], "position": start}, name="prefill")
    tersor.capture(cached, {"input_ids": ids[:, :1], "position": start}, name="decode", into=program)
    session = tersor.compile(program, threads=1).session()

    def torch_step(tokens: torch.Tensor, position: int) -> torch.Tensor:
        with torch.inference_mode():
            return cached(tokens, torch.tensor(position))["logits"]

    def our_step(tokens: torch.Tensor, position: int) -> torch.Tensor:
        step = session.decode if tokens.shape[1] == 1 else session.prefill
        return step(input_ids=tokens, position=position).logits

    engines: dict[str, Callable] = {"tersor": our_step, "torch": torch_step}
    times: dict[str, list[float]] = {name: [] for name in engines}
    worst = 0.0
    for position in (0, *range(PROMPT, ids.shape[1])):
        tokens = ids[:, position : position + (1 if position else PROMPT)]
        logits = {}
        for name, step in engines.items():
            begin = time.perf_counter()
            logits[name] = step(tokens, position)
            times[name].append((time.perf_counter() - begin) * 1e3)
        error = (logits["tersor"] - logits["torch"]).abs().max() / logits["torch"].abs().max()
        worst = max(worst, float(error))
    for name, (prefill, *steps) in times.items():
        print(f"{name:7} prefill of {PROMPT} {prefill:8.2f} ms, step {statistics.median(steps):8.3f} ms median,"
              f" {min(steps):8.3f} ms min")  # fmt: skip
    ratios = [b / a for a, b in zip(times["tersor"][1:], times["torch"][1:], strict=True)]
    print(
        f"torch / tersor, step by step: {statistics.median(ratios):.2f}; largest error of the logits {worst:.1e}"
    )


if __name__ == "__main__":
    main()
