"""Fewer bits, fewer bytes and less time: every benchmark entry in float32, bf16 and 8 bits.

The artifacts of an entry run in one process, bound to one CPU, in turns whose order alternates. int8 is calibrated with
random data, which proves bytes and speed only.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from itertools import pairwise
from pathlib import Path

import tersor
from benchmarks.models import MODELS, Model
from benchmarks.record import Record
from benchmarks.run import RESULTS
from benchmarks.turns import take_turns

RECIPES = ("fp32", "bf16", "int8")
"""From wide to narrow: each has to take fewer bytes and less time than the one before it."""


def main() -> None:
    """Print a row for every entry, and what does not fall from recipe to recipe."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.precisions", description=__doc__)
    parser.add_argument("--models", type=lambda text: text.split(","), default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    command = ["python", "-m", "benchmarks.precisions", "--models", ",".join(options.models)]
    record = Record(
        "Bytes and latency by recipe",
        command,
        ("tersor",),
        "Weights in MB; median milliseconds on one thread. The last column: what does not fall from left to right.",
        ("model", "input", *(f"{r} MB" for r in RECIPES), *(f"{r} ms" for r in RECIPES), "exceptions"),
    )
    for name in options.models:
        model = MODELS[name]
        module = model.build()
        for batch, length in model.shapes:
            sizes, medians = _measured(model, module, batch, length, options.rounds)
            exceptions = [
                f"{narrow} is no {what}"
                for what, figures in (("smaller", sizes), ("faster", medians))
                for wide, narrow in pairwise(RECIPES)
                if not figures[narrow] < figures[wide]
            ]
            cells = [*(f"{sizes[r] / 1e6:.1f}" for r in RECIPES), *(f"{medians[r]:.4g}" for r in RECIPES)]
            record.add(name, model.label(batch, length), *cells, "; ".join(exceptions) or "none")
    record.write(options.output, "precisions")


def _measured(
    model: Model, module: object, batch: int, length: int, rounds: int
) -> tuple[dict[str, int], dict[str, float]]:
    """Bytes of the weights and median milliseconds of each recipe."""
    inputs = model.inputs(batch, length)
    with tempfile.TemporaryDirectory() as folder:
        compiled = {
            recipe: tersor.compile(
                module,
                inputs,
                recipe=recipe,
                calibration=model.calibration(inputs) if recipe == "int8" else None,
                output=Path(folder, f"{recipe}.tersor"),
                threads=1,
            )
            for recipe in RECIPES
        }
        sizes = {r: Path(folder, f"{r}.tersor/weights.safetensors").stat().st_size for r in RECIPES}
        times = take_turns(compiled, inputs, rounds)
    return sizes, {recipe: statistics.median(times[recipe]) for recipe in RECIPES}


if __name__ == "__main__":
    main()
