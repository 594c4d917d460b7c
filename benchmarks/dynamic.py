"""What symbolic sizes cost: one artifact for batch 1..8 and length 1..512 beside one compiled for each length.

Both run in this process, bound to one CPU, in turns whose order alternates.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from pathlib import Path

import tersor
from benchmarks.models import MODELS
from benchmarks.turns import take_turns

LENGTHS = (16, 100, 128, 384)


def main() -> None:
    """Print medians and their ratio for every length."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dynamic", description=__doc__)
    parser.add_argument("--model", choices=[n for n, m in MODELS.items() if not m.image], default="minilm-l6")
    parser.add_argument("--lengths", type=lambda text: tuple(map(int, text.split(","))), default=LENGTHS)
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    model = MODELS[options.model]
    axes = {0: ("batch", 1, 8), 1: ("length", 1, 512)}
    torch_model = model.build()
    example = model.inputs(2, 16)
    os.environ["TERSOR_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        dynamic = tersor.compile(
            torch_model, example, dynamic=dict.fromkeys(example, axes), output=Path(folder, "dynamic.tersor")
        )
        for length in options.lengths:
            inputs = model.inputs(1, length)
            static = tersor.compile(torch_model, inputs, output=Path(folder, f"{length}.tersor"))
            times = take_turns({"static": static, "dynamic": dynamic}, inputs, options.rounds)
            medians = {name: statistics.median(t) for name, t in times.items()}
            ratio = medians["dynamic"] / medians["static"]
            print(
                f"{options.model} 1x{length}, 1 thread: dynamic {medians['dynamic']:.3f} ms, "
                f"static {medians['static']:.3f} ms, ratio {ratio:.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
