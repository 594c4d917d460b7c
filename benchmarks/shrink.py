"""What exact folds gain: BERT-base with planted zero heads and neurons, compiled with and without the folds.

Layer i (0..11) has i % 6 heads and 128 * i neurons whose output weights are zero. Both artifacts run in this process,
bound to one CPU, in turns whose order alternates.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

import tersor
from benchmarks.models import MODELS
from benchmarks.turns import take_turns


def main() -> None:
    """Print bytes, latency and the largest difference of the outputs."""
    model = MODELS["bert-base"]
    torch_model, inputs = model.build(), model.inputs(1, 128)
    for index, layer in enumerate(torch_model.encoder.layer):
        layer.attention.output.dense.weight.data[:, : (index % 6) * 64] = 0
        layer.output.dense.weight.data[:, : 128 * index] = 0
    program = tersor.capture(torch_model, inputs)
    with tempfile.TemporaryDirectory() as folder:
        compiled = {
            recipe: tersor.compile(program, recipe=recipe, output=Path(folder, f"{recipe}.tersor"), threads=1)
            for recipe in ("none", "fp32")
        }
        sizes = {name: Path(folder, f"{name}.tersor/weights.safetensors").stat().st_size for name in compiled}
        times = take_turns(compiled, inputs)
        before, after = (compiled[name](**inputs) for name in ("none", "fp32"))
    worst = max(float(abs(after[name] - before[name]).max() / abs(before[name]).max()) for name in before)
    for name in compiled:
        print(f"{name:5} {sizes[name] / 1e6:7.1f} MB  {statistics.median(times[name]):7.2f} ms median")
    print(f"largest difference of the outputs, relative to their scale: {worst:.1e}")


if __name__ == "__main__":
    main()
